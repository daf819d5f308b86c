"""Flags of LoRA training: keys of the text_decoder and its lora block in a model.json, on top of what the file says."""

from __future__ import annotations

import argparse
from typing import Any

KEYS = {key: f"lora_{key}" for key in ("r", "alpha", "dropout", "target_modules", "use_rslora", "use_dora", "load")}
KEYS |= {"modules_to_save": "lora_modules_to_save", "loraplus_lr_ratio": "loraplus_lr_ratio"}
"""Key of the lora block -> attribute of the flag."""


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `given_lora` and `given_decoder`, named as in MindSpeed-MM, PEFT and LLaVA."""
    group = parser.add_argument_group(
        "LoRA of the text decoder, which any --lora flag switches on (other parts: a lora block in --mm-model)"
    )
    group.add_argument("--lora-r", type=int, metavar="R", help="rank of the adapters (default 16)")
    group.add_argument("--lora-alpha", type=float, metavar="ALPHA", help="scale x R (default 32)")
    group.add_argument("--lora-dropout", type=float, metavar="P", help="dropout before A (default 0)")
    group.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="NAME",
        help="q_proj v_proj ..., linear_qkv ..., all-linear (default), or one regular expression",
    )
    group.add_argument(
        "--lora-load",
        metavar="PATH",
        help="start from an adapter in PEFT's format, or in a checkpoint_N.pth of MiniGPT-v2",
    )
    group.add_argument(
        "--lora-modules-to-save",
        nargs="+",
        metavar="NAME",
        help="modules that are trained as a whole beside them: lm_head, embed_tokens ...",
    )
    group.add_argument("--lora-use-rslora", action="store_true", default=None, help="scale ALPHA / sqrt(R)")
    group.add_argument("--lora-use-dora", action="store_true", default=None, help="trained lengths of rows (DoRA)")
    group.add_argument("--loraplus-lr-ratio", type=float, metavar="N", help="learning rate of B over that of A (LoRA+)")
    group.add_argument(
        "--neftune-noise-alpha",
        type=float,
        metavar="ALPHA",
        help="noise on word embeddings (NEFTune; without LoRA too)",
    )
    group.add_argument("--quantize", choices=("nf4", "fp4", "int8"), help="base in 4 or 8 bits (QLoRA)")
    group.add_argument("--double-quant", action="store_true", default=None, help="its scales in 8 bits, too")


def given_lora(namespace: argparse.Namespace) -> dict[str, Any]:
    """Keys of a lora block that the flags give; empty where none is given."""
    from mindspeed_mm.models.adapters.targets import as_targets

    given = {key: getattr(namespace, name) for key, name in KEYS.items()}
    given = {key: value for key, value in given.items() if value is not None}
    if "target_modules" in given:
        given["target_modules"] = as_targets(given["target_modules"])
    return given


def given_decoder(namespace: argparse.Namespace) -> dict[str, Any]:
    """Further keys of the text_decoder that the flags give."""
    given = {key: getattr(namespace, key) for key in ("quantize", "double_quant", "neftune_noise_alpha")}
    return {key: value for key, value in given.items() if value is not None}
