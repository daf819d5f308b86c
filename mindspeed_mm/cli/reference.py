"""`mindspeed-mm reference`: log-probabilities of the reference for all preference pairs, before any training."""

from __future__ import annotations

import argparse
from typing import Any

from mindspeed_mm import ending
from mindspeed_mm.cli import train
from mindspeed_mm.errors import ConfigError

HELP = "compute the reference's log-probabilities of all preference pairs ahead of training (--pref-cache)"
EXAMPLE = (
    "torchrun --nproc_per_node 8 -m mindspeed_mm reference --mm-model examples/hallucination/model.json "
    "--mm-data examples/hallucination/data.json --lr 2e-6 --train-iters 1000 --micro-batch-size 4 "
    "--global-batch-size 128 --bf16 --pref-cache reference"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `train`: the line of a run serves as it is. Steps, rates, saves and logs change nothing here."""
    train.add_arguments(parser, steps=False)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Fill the folder. Returns folder, pairs (in it now), computed (of them by this command) and samples for --json."""
    if namespace.pref_cache is None:
        raise ConfigError(
            "mindspeed-mm reference needs --pref-cache DIR, the folder that log-probabilities go to; give the run that "
            "is trained the same one"
        )
    if namespace.feature_cache is not None or namespace.feature_cache_size is not None:
        raise ConfigError("--feature-cache does not go with a reference: leave it out")
    training = train.prepared(namespace)
    from megatron.driver import initialize, watch

    with ending.closing():
        ending.at_end(initialize.shutdown)
        initialize.initialize(training.inputs.args, training.inputs.platform)
        with watch.naming_lost_ranks():
            return training.write_reference()
