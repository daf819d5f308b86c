"""Flags of LLaVA and of its HA-DPO fork that say what trains (config/trained_parts.py)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mindspeed_mm.cli.flags.lora import given_decoder, given_lora

if TYPE_CHECKING:
    from mindspeed_mm.config.trained_parts import ModelFlags

SWITCHES = {
    "freeze_backbone": "train neither the decoder (but its head) nor the vision encoder",
    "tune_mm_mlp_adapter": "train the projector alone",
    "freeze_mm_mlp_adapter": "do not train the projector",
    "tune_lm_head": "train the decoder's head, or not; the projector then trains with --tune-mm-mlp-adapter alone",
    "tune_post_interaction_block": "train the block in front of the head, or not",
}
ALIASES = {"tune_post_interaction_block": ("tune_post_decoder",)}
"""Earlier names of a switch."""
PROJECTOR = "pretrain_mm_mlp_adapter"
RATES = {"mm_projector_lr": "of the projector", "vision_encoder_lr": "of the vision encoder"}


def add_trained_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `given_flags`, in the originals' spelling too; a switch takes True, False or nothing (True)."""
    group = parser.add_argument_group("what trains, as LLaVA says it (else: freeze, parameters, lr in --mm-model)")
    for name, text in SWITCHES.items():
        flags = [flag for own in (name, *ALIASES.get(name, ())) for flag in _spellings(own)]
        group.add_argument(*flags, nargs="?", const=True, type=_switch, metavar="BOOL", help=text, dest=name)
    for name, text in RATES.items():
        group.add_argument(*_spellings(name), type=float, metavar="LR", help=f"learning rate {text}")
    group.add_argument(
        *_spellings(PROJECTOR),
        metavar="PATH",
        help="what the projector begins with: a projector file, stage 1's save folder, or a whole model",
    )


def given_flags(namespace: argparse.Namespace) -> ModelFlags:
    """What these flags and those of LoRA change of a model.json."""
    from mindspeed_mm.config.trained_parts import ModelFlags, TrainedParts

    parts = TrainedParts(**{name: getattr(namespace, name) for name in (*SWITCHES, *RATES, PROJECTOR)})
    return ModelFlags(given_lora(namespace), given_decoder(namespace), parts)


def _spellings(name: str) -> tuple[str, ...]:
    return (f"--{name.replace('_', '-')}", f"--{name}")


def _switch(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")
    return values[text.lower()]
