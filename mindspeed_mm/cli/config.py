"""`mindspeed-mm config`: a model.json from weights at hand."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

HELP = "write a model.json for weights at hand"
EXAMPLE = "mindspeed-mm config init internlm2-chat-7b clip-vit-large-patch14-336 > model.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("init",), help="init: describe the weights of the given folders or files")
    parser.add_argument("weights", metavar="WEIGHTS", nargs="+", help="a whole model, or parts; in any readable layout")
    parser.add_argument("--num-attention-heads", type=int, metavar="N", help="of a vision encoder that does not say it")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Print the model.json. Returns it for --json."""
    from mindspeed_mm.inference.model_json import model_json_of

    block = model_json_of(namespace.weights, num_attention_heads=namespace.num_attention_heads)
    if not namespace.json:
        sys.stdout.write(json.dumps(block, indent=2) + "\n")
    return block
