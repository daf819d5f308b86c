"""Flags of LoRA training: the keys of the text_decoder's lora block in a model.json, on top of what the file says."""

from __future__ import annotations

import argparse
from typing import Any

KEYS = ("r", "alpha", "dropout", "target_modules", "load")


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `given_lora`, named as in MindSpeed-MM."""
    group = parser.add_argument_group("LoRA of the text decoder (other parts: a lora block in --mm-model)")
    group.add_argument("--lora-r", type=int, metavar="R", help="rank of the adapters (default 16)")
    group.add_argument("--lora-alpha", type=float, metavar="ALPHA", help="scale x R (default 32)")
    group.add_argument("--lora-dropout", type=float, metavar="P", help="dropout before A (default 0)")
    group.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="NAME",
        help="q_proj v_proj ..., linear_qkv ..., all-linear (default), or one regular expression",
    )
    group.add_argument("--lora-load", metavar="DIR", help="start from an adapter in PEFT's format")


def given_lora(namespace: argparse.Namespace) -> dict[str, Any]:
    """Keys of a lora block that the flags give; empty where none is given."""
    from mindspeed_mm.models.adapters.targets import as_targets

    given = {key: getattr(namespace, f"lora_{key}") for key in KEYS}
    given = {key: value for key, value in given.items() if value is not None}
    if "target_modules" in given:
        given["target_modules"] = as_targets(given["target_modules"])
    return given
