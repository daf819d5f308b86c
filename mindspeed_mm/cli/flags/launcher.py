"""Megatron flags that the ancestor's inference and evaluation launchers pass; most have no effect here."""

from __future__ import annotations

import argparse
import logging

logger = logging.getLogger(__name__)

VALUES = (
    *("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size"),
    *("micro-batch-size", "global-batch-size", "num-workers", "seq-length", "num-layers", "hidden-size"),
    *("ffn-hidden-size", "num-attention-heads", "max-position-embeddings", "vocab-size", "tokenizer-type"),
    *("position-embedding-type", "normalization", "attention-dropout", "hidden-dropout", "img-h", "img-w"),
    *("patch-dim", "distributed-backend", "distributed-timeout-minutes"),
)
SWITCHES = (
    *("swiglu", "use-flash-attn", "use-fused-rotary-pos-emb", "no-masked-softmax-fusion"),
    *("no-gradient-accumulation-fusion", "no-load-optim", "no-load-rng", "no-save-optim", "no-save-rng"),
)
PARALLEL = VALUES[:3]
"""Sizes that a command without model parallelism only takes at 1."""


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Add --fp16, --bf16 (as --dtype) and the flags above, except those that the command has itself."""
    group = parser.add_argument_group("accepted for the ancestor's launchers")
    precision = group.add_mutually_exclusive_group()
    for dtype in ("fp16", "bf16"):
        precision.add_argument(f"--{dtype}", dest="dtype", action="store_const", const=dtype, help=f"--dtype {dtype}")
    known = {option for action in parser._actions for option in action.option_strings}
    for name in VALUES:
        if f"--{name}" not in known:
            group.add_argument(f"--{name}", dest=f"launcher_{name}", metavar="VALUE", help=argparse.SUPPRESS)
    for name in SWITCHES:
        if f"--{name}" not in known:
            group.add_argument(f"--{name}", dest=f"launcher_{name}", action="store_true", help=argparse.SUPPRESS)


def check_launcher_flags(namespace: argparse.Namespace) -> None:
    """Say which of the given flags have no effect.

    Raises:
        ConfigError: a parallel size above 1 where the command has no model parallelism.
    """
    from mindspeed_mm.errors import ConfigError

    given = {name: getattr(namespace, f"launcher_{name}", None) for name in (*VALUES, *SWITCHES)}
    given = {name: value for name, value in given.items() if value}
    for name in PARALLEL:
        if given.pop(name, "1") != "1":
            raise ConfigError(f"--{name} above 1 is not supported by this command: use 1")
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        logger.info("without an effect here (the model's config and --batch-size decide): %s", flags)
