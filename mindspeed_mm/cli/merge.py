"""`mindspeed-mm merge`: adapters and partial weights into a copy of a base folder."""

from __future__ import annotations

import argparse
import sys
from typing import Any

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
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="type of merged tensors (default: BASE's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--allow-nonfinite", action="store_true", help="also write weights with NaN or Inf")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Merge. Returns the names for --json."""
    from checkpoint_converters.merge import merge

    done = merge(
        namespace.base,
        namespace.partial,
        namespace.output,
        overwrite=namespace.overwrite,
        allow_nonfinite=namespace.allow_nonfinite,
        dtype=namespace.dtype,
    )
    sys.stdout.write(f"wrote {namespace.output}: {len(done.replaced)} tensors replaced, {len(done.added)} added\n")
    return {"target": namespace.output, "replaced": list(done.replaced), "added": list(done.added)}
