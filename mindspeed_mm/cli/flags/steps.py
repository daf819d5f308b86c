"""--do-train, --do-eval, --do-predict, --do-multi-predict: what a launch does, in the words of HF's trainer."""

from __future__ import annotations

import argparse
from typing import Any

from mindspeed_mm.errors import ConfigError

STEPS = {"eval": "do_eval", "test": "do_predict", "multitest": "do_multi_predict"}
"""Keys of `prediction` in data.json, and what asks for them."""

BATCH_SIZE = 8


def add_predict_arguments(group: Any) -> None:
    """Which sets of data.json are answered, and how many records at a time."""
    group.add_argument("--do-eval", action="store_true", help="answer the set prediction.eval of --mm-data")
    group.add_argument("--do-predict", action="store_true", help="answer the set prediction.test")
    group.add_argument("--do-multi-predict", action="store_true", help="answer every set of prediction.multitest")
    group.add_argument(
        "--predict-batch-size", type=int, default=BATCH_SIZE, metavar="N", help="records answered at a time"
    )


def add_steps_arguments(group: Any) -> None:
    """The same for `train`, which trains before."""
    group.add_argument(
        "--do-train",
        choices=("true", "false"),
        default="true",
        help="false: only answer sets, with --load or the weights of --mm-model",
    )
    add_predict_arguments(group)


def wanted_prefixes(namespace: argparse.Namespace, config: Any) -> list[str]:
    """Prefixes of the sets that the flags ask for, in their order.

    Raises ConfigError where data.json has none of them, or a batch size is below 1.
    """
    if namespace.predict_batch_size < 1:
        raise ConfigError(f"--predict-batch-size is {namespace.predict_batch_size}; expected at least 1")
    found: list[str] = []
    for key, name in STEPS.items():
        if not getattr(namespace, name):
            continue
        own = [prefix for prefix in config.predicted_sets if prefix.split("_")[0] == key]
        if not own:
            raise ConfigError(
                f'--{name.replace("_", "-")} is given, and data.json has no "prediction": {{"{key}": ..}}; add the set '
                "(docs/prediction.md), or leave the flag out"
            )
        found += own
    return found


def asks_for_answers(namespace: argparse.Namespace) -> bool:
    """Whether any set is to be answered."""
    return any(getattr(namespace, name) for name in STEPS.values())
