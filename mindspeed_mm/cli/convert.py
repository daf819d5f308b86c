"""`mindspeed-mm convert`: weights from one layout to another."""

from __future__ import annotations

import argparse
import sys
from typing import Any

HELP = "convert weights between layouts"
EXAMPLE = "mindspeed-mm convert llava-v1.5-7b converted --to mindspeed-mm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="weights in any readable layout, or a training checkpoint")
    parser.add_argument("target", metavar="DST", help="folder that is written; must not exist")
    parser.add_argument("--to", required=True, help="layout of the target")
    parser.add_argument("--dtype", help="fp32, fp16 or bf16; default: as stored")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Convert. Returns the written files for --json."""
    import mindspeed_mm.checkpoint_source  # noqa: F401  registers the checkpoint layout
    from checkpoint_converters.convert import convert

    written = [
        str(path) for path in convert(namespace.source, namespace.target, to=namespace.to, dtype=namespace.dtype)
    ]
    sys.stdout.write("".join(f"wrote {path}\n" for path in written))
    return {"target": namespace.target, "to": namespace.to, "files": written}
