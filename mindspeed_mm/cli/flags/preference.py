"""Flags of preference training: options of the objective dpo, on top of those in data.json's "objective"."""

from __future__ import annotations

import argparse
from typing import Any

KEYS = (
    *("loss", "beta", "label_smoothing", "ftx", "gamma", "reference_free", "length_average", "auxiliary_weight"),
    "hadpo_keys",
)


def add_preference_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `given_preferences`."""
    group = parser.add_argument_group("preferences (--objective dpo)")
    group.add_argument("--pref-loss", metavar="NAME", help="sigmoid (default), hinge, ipo, orpo or simpo")
    group.add_argument("--pref-beta", type=float, metavar="BETA", help="scale of the log-ratios (default 0.1)")
    group.add_argument(
        "--pref-label-smoothing", type=float, metavar="P", help="share of turned preferences (default 0)"
    )
    group.add_argument("--pref-ftx", type=float, metavar="W", help="weight of the chosen answer's own loss (default 0)")
    group.add_argument("--pref-gamma", type=float, metavar="GAMMA", help="margin of simpo (default 0.5)")
    group.add_argument(
        "--pref-reference-free", action="store_const", const=True, help="a reference that likes both answers equally"
    )
    group.add_argument(
        "--pref-length-average", action="store_const", const=True, help="log-probabilities of a token on average"
    )
    group.add_argument(
        "--pref-auxiliary-weight",
        type=float,
        metavar="W",
        help="weight of the loss of a conversation of auxiliary_parameters beside each pair (default 0)",
    )
    group.add_argument(
        "--pref-hadpo-keys",
        action="store_const",
        const=True,
        help="also log policy_logps/* and referece_logps/*, as HA-DPO spells them",
    )
    group.add_argument(
        "--pref-cache", metavar="DIR", help="keep the reference's log-probabilities here for later epochs and runs"
    )


def given_preferences(namespace: argparse.Namespace) -> dict[str, Any]:
    """Options that the flags give; empty where none is given."""
    given = {key: getattr(namespace, f"pref_{key}") for key in KEYS}
    return {key: value for key, value in given.items() if value is not None}
