"""`mindspeed-mm merge`: adapters and partial weights into a copy of a base folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mindspeed_mm.cli.verify import LOGIT_TOLERANCE
from mindspeed_mm.errors import WeightError

HELP = "merge LoRA adapters and partial weights (a projector, a head ...) into a copy of a base folder"
EXAMPLE = "mindspeed-mm merge llava-v1.5-7b non_lora_trainables.bin --output llava-v1.5-7b-tuned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help="folder in layout hf, clip or a family's (llava, llava-hf ...); only read"
    )
    parser.add_argument(
        "partial",
        metavar="PARTIAL",
        nargs="+",
        help="adapters in PEFT's format (folders), and files of tensors that replace those of BASE",
    )
    parser.add_argument("--output", required=True, metavar="DST", help="new folder")
    parser.add_argument(
        "--to", metavar="LAYOUT", help="llava-hf, llava, hf (the decoder), clip ...: as in convert (default: BASE's)"
    )
    parser.add_argument(
        "--tune-stage",
        "--tune_stage",
        type=int,
        choices=(0, 1, 2),
        help="take what replace_bin.py of the post-interaction block's fork takes: 1 adds the block, 2 replaces block "
        "and head of a base that has a block, 0 adds the block and replaces the head",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="type of merged tensors (default: BASE's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--allow-nonfinite", action="store_true", help="also write weights with NaN or Inf")
    parser.add_argument(
        "--no-logits", action="store_true", help="do not compute merged against adapter-on logits afterwards"
    )


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Merge. Returns the names and the figures for --json."""
    from checkpoint_converters.merge import merge

    done = merge(
        namespace.base,
        namespace.partial,
        namespace.output,
        overwrite=namespace.overwrite,
        allow_nonfinite=namespace.allow_nonfinite,
        dtype=namespace.dtype,
        to=namespace.to,
        tune_stage=namespace.tune_stage,
    )
    sys.stdout.write(f"wrote {namespace.output}: {len(done.replaced)} tensors replaced, {len(done.added)} added\n")
    adapters = [Path(path) for path in namespace.partial if Path(path).is_dir()]
    result = {"target": namespace.output, "replaced": list(done.replaced), "added": list(done.added)}
    if adapters and not done.added and not namespace.no_logits:
        result["outputs"] = _compare(namespace, adapters[-1])
    return result


def _compare(namespace: argparse.Namespace, adapter: Path) -> dict[str, Any]:
    """Print merged against adapter-on outputs. Raises WeightError where they differ in float32."""
    from checkpoint_converters.merge import merged_source
    from mindspeed_mm.inference.compare_adapters import compare_merged, in_float32
    from mindspeed_mm.models.sources import open_source

    base = merged_source(namespace.base, namespace.partial, last_adapter=False)
    merged = open_source(namespace.output)
    outputs = compare_merged(base, adapter, merged)
    if not outputs:
        sys.stdout.write(f"not compared: {namespace.output} is no decoder, vision encoder of one size or whole model\n")
    for figures in outputs.values():
        top1 = f", top-1 agreement {figures['top1']:.4f}" if "top1" in figures else ""
        sys.stdout.write(
            f"merged against adapter-on {figures['outputs']} ({figures['positions']} positions): "
            f"max |d| {figures['max']:.3g}, mean |d| {figures['mean']:.3g}{top1}\n"
        )
        if figures["max"] > LOGIT_TOLERANCE and in_float32(merged):
            raise WeightError(
                f"{namespace.output}: merged {figures['outputs']} differ from those with the adapter on by "
                f"{figures['max']:.3g}; allowed are {LOGIT_TOLERANCE:g} in float32. Do not use the result"
            )
    return outputs
