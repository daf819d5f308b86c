"""What the three scripts of examples/llava1.5 share: open, convert one part, say what was written."""

import argparse
import sys
from pathlib import Path

from checkpoint_converters.convert import FILE_NAMES, convert_part
from checkpoint_converters.specs import specs_of
from mindspeed_mm.models.sources import open_source

DTYPE_CHOICES = ("keep", "fp32", "fp16", "bf16")


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --dtype, which the guide's converters decide silently."""
    parser.add_argument(
        "--dtype", choices=DTYPE_CHOICES, default=default, help="type of the stored tensors (default: %(default)s)"
    )


def run(part: str, source: Path, folder: Path, *, dtype: str, num_attention_heads: int | None = None) -> int:
    """Convert `part` of `source` into `folder` and return the exit status: 0, or 1 with the error on stderr."""
    try:
        opened = open_source(source)
        done = convert_part(
            opened.part(part),
            folder / FILE_NAMES[part],
            spec=specs_of(opened, [part], num_attention_heads)[part],
            dtype=None if dtype == "keep" else dtype,
            num_attention_heads=num_attention_heads,
        )
    except ValueError as error:  # the base of the project's errors
        sys.stderr.write(f"error: {error}\n")
        return 1
    if done.assumed:
        sys.stderr.write(
            f"note: the source does not say {', '.join(done.assumed)}; the rule of OpenAI's CLIP (width / 64) was "
            "taken. Give --num-attention-heads where that is wrong.\n"
        )
    sys.stdout.write(f"{done.path}: {done.tensors} tensors, {done.nbytes / 1e6:.1f} MB\n")
    return 0
