"""`mindspeed-mm convert`: weights from one layout to another."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_mm.weights.sources import Source

HELP = "convert weights between layouts"
EXAMPLE = (
    "mindspeed-mm convert llava-v1.5-7b llava-v1.5-7b-hf --to llava-hf --verify\n"
    "  mindspeed-mm convert --text-decoder vicuna-7b --vision-encoder ViT-L-14-336px.pt \\\n"
    "      --projector mm_projector.bin llava-7b --to llava"
)

PART_FLAGS = {
    "text_decoder": "--text-decoder",
    "vision_encoder": "--vision-encoder",
    "vision_projector": "--projector",
    "interaction": "--interaction",
}
TRAINED_ALONE = ("peft", "minigpt4-trained", "flamingo-trained")
"""Layouts of what a run has trained."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of a size such as 5GB. Raises ArgumentTypeError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(|[KMG]B)", text.strip().upper())
    if not found or float(found[1]) * UNITS[found[2]] < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a size such as 5GB, 500MB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="SRC DST: weights in any readable layout, a training checkpoint or a model.json that names weights, and "
        "the target; DST alone beside flags that name the parts",
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="LAYOUT",
        help="layout of the target: mindspeed-mm, llava-hf, llava, hf, clip, projector, post-block, checkpoint, peft, "
        "minigpt4-trained, flamingo-trained, or that of a family (blip2, instructblip, minigpt4, ...; docs/models.md)",
    )
    for kind, flag in PART_FLAGS.items():
        parser.add_argument(
            flag, dest=kind, metavar="PATH", help=f"{kind} of a model whose parts lie apart; no SRC then"
        )
    parser.add_argument(
        "--dtype", choices=("keep", "fp32", "fp16", "bf16"), default="keep", help="type to store (default: as stored)"
    )
    parser.add_argument(
        "--part", action="append", choices=tuple(PART_FLAGS), help="convert this part alone; may be repeated"
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default="5GB",
        help="largest shard of a folder that has shards (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    parser.add_argument("--allow-nonfinite", action="store_true", help="also write weights with NaN or Inf")
    parser.add_argument("--num-attention-heads", type=int, help="heads of a vision encoder whose weights do not say it")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, instead of the source's")
    parser.add_argument(
        "--image-processor", metavar="DIR", help="folder of the image processor, instead of the source's"
    )
    parser.add_argument(
        "--box-tokens",
        action="store_true",
        help="add Shikra's 1,007 words of boxes and points (<bin_0> ...) to tokenizer and vocabulary, as mean rows",
    )
    parser.add_argument(
        "--quantize",
        choices=("nf4", "fp4", "int8"),
        help="the decoder's linears in 4 or 8 bits, as a QLoRA run stores them; --to checkpoint alone",
    )
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format that is merged into SRC")
    parser.add_argument("--double-quant", action="store_true", help="beside --quantize: their scales in 8 bits, too")
    parser.add_argument(
        "--verify", action="store_true", help="compare tensors, and for whole models logits, afterwards"
    )

    _accept_paths_anywhere(parser)


def _accept_paths_anywhere(parser: argparse.ArgumentParser) -> None:
    """Let paths stand before and behind flags (`SRC --to X DST`); argparse alone takes them in one place."""
    original = parser.parse_known_args

    def parse(args=None, namespace=None):
        found, rest = original(args, namespace)
        found.paths += [word for word in rest if not word.startswith("-")]
        return found, [word for word in rest if word.startswith("-")]

    parser.parse_known_args = parse


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Convert. Returns the written files for --json."""
    from checkpoint_converters.convert import convert
    from checkpoint_converters.merge_adapters import record_merged

    if namespace.verify and namespace.to in TRAINED_ALONE:
        raise ConfigError(
            f"--verify compares whole models, and --to {namespace.to} writes what was trained alone: leave it out"
        )
    if namespace.verify and namespace.quantize:
        raise ConfigError("--verify compares equal weights, and --quantize rounds them: leave one of them out")
    source, target = _source(namespace)
    written = convert(
        source if namespace.adapter is None else _adapted(source, namespace),
        target,
        to=namespace.to,
        dtype=namespace.dtype,
        num_attention_heads=namespace.num_attention_heads,
        parts=namespace.part,
        shard_size=namespace.shard_size,
        overwrite=namespace.overwrite,
        allow_nonfinite=namespace.allow_nonfinite,
        tokenizer=namespace.tokenizer,
        image_processor=namespace.image_processor,
        box_tokens=namespace.box_tokens,
        quantize=namespace.quantize,
        double_quant=namespace.double_quant,
    )
    if namespace.adapter is not None and Path(target).is_dir():
        record_merged(Path(source), [namespace.adapter], Path(target))
    sys.stdout.write("".join(f"wrote {path}\n" for path in written))
    result = {"target": target, "to": namespace.to, "files": [str(path) for path in written]}
    if namespace.verify:
        from mindspeed_mm.cli.verify import verify

        result["verify"] = verify(source, target, num_attention_heads=namespace.num_attention_heads)
    return result


def _adapted(source: str | dict[str, str], namespace: argparse.Namespace) -> Source:
    """SRC with an adapter merged into it. Raises ConfigError for what does not go with --adapter."""
    from checkpoint_converters.merge import merged_source

    if isinstance(source, dict) or namespace.verify or namespace.to in TRAINED_ALONE:
        beside = (
            "parts that lie apart" if isinstance(source, dict) else "--verify" if namespace.verify else namespace.to
        )
        raise ConfigError(
            f"--adapter merges an adapter into SRC, its base, and was given beside {beside}; expected SRC "
            "DST alone. mindspeed-mm merge compares the result with the adapter on"
        )
    return merged_source(source, [namespace.adapter], dtype=namespace.dtype)


def _source(namespace: argparse.Namespace) -> tuple[str | dict[str, str], str]:
    """(SRC or the parts by kind, DST). Raises ConfigError unless exactly one of the forms is used."""
    parts = {kind: getattr(namespace, kind) for kind in PART_FLAGS if getattr(namespace, kind)}
    expected = 1 if parts else 2
    if len(namespace.paths) != expected:
        form = f"{' '.join(PART_FLAGS.values())} and DST alone" if parts else "SRC DST"
        raise ConfigError(f"found {len(namespace.paths)} paths ({' '.join(namespace.paths)}); expected {form}.")
    return (parts or namespace.paths[0]), namespace.paths[-1]
