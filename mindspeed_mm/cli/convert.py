"""`mindspeed-mm convert`: weights from one layout to another."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from mindspeed_mm.errors import ConfigError

HELP = "convert weights between layouts"
EXAMPLE = (
    "mindspeed-mm convert llava-v1.5-7b llava-v1.5-7b-hf --to llava-hf --verify\n"
    "  mindspeed-mm convert --text-decoder vicuna-7b --vision-encoder ViT-L-14-336px.pt \\\n"
    "      --projector mm_projector.bin llava-7b --to llava"
)

LAYOUTS = ("mindspeed-mm", "llava-hf", "llava", "hf", "clip", "projector", "checkpoint", "peft")
PART_FLAGS = {"text_decoder": "--text-decoder", "vision_encoder": "--vision-encoder", "vision_projector": "--projector"}
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
        help="SRC DST: weights in any readable layout or a training checkpoint, and the target; DST alone beside flags "
        "that name the parts",
    )
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of the target")
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

    source, target = _source(namespace)
    written = convert(
        source,
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
    )
    sys.stdout.write("".join(f"wrote {path}\n" for path in written))
    result = {"target": target, "to": namespace.to, "files": [str(path) for path in written]}
    if namespace.verify and namespace.to == "peft":
        raise ConfigError("--verify compares whole models, and --to peft writes adapters alone: leave it out")
    if namespace.verify:
        from mindspeed_mm.cli.verify import verify

        result["verify"] = verify(source, target, num_attention_heads=namespace.num_attention_heads)
    return result


def _source(namespace: argparse.Namespace) -> tuple[str | dict[str, str], str]:
    """(SRC or the parts by kind, DST). Raises ConfigError unless exactly one of the forms is used."""
    parts = {kind: getattr(namespace, kind) for kind in PART_FLAGS if getattr(namespace, kind)}
    expected = 1 if parts else 2
    if len(namespace.paths) != expected:
        form = f"{' '.join(PART_FLAGS.values())} and DST alone" if parts else "SRC DST"
        raise ConfigError(f"found {len(namespace.paths)} paths ({' '.join(namespace.paths)}); expected {form}.")
    return (parts or namespace.paths[0]), namespace.paths[-1]
