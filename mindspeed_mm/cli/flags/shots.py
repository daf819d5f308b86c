"""Flags of few-shot evaluation."""

from __future__ import annotations

import argparse

from mindspeed_mm.errors import ConfigError


def add_shots_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `given_shots`."""
    group = parser.add_argument_group("few-shot")
    group.add_argument("--shots", type=int, metavar="K", default=0, help="show K answered questions before each one")
    group.add_argument(
        "--shots-table", metavar="FILE", help="where they are drawn from (default: the table's own split train)"
    )
    group.add_argument("--shots-image-root", metavar="DIR", help="folder of the images of --shots-table")
    group.add_argument("--shots-seed", type=int, metavar="N", help="which ones are drawn (default 0)")


def given_shots(namespace: argparse.Namespace):
    """The evaluation.few_shot.Shots that the flags ask for; None for none. Raises ConfigError for flags that would be
    ignored."""
    rest = {
        "--shots-table": namespace.shots_table,
        "--shots-image-root": namespace.shots_image_root,
        "--shots-seed": namespace.shots_seed,
    }
    given = [flag for flag, value in rest.items() if value is not None]
    if not namespace.shots:
        if given:
            raise ConfigError(f"{given[0]} is given without --shots; add --shots K, or remove it")
        return None
    if namespace.predictions:
        raise ConfigError("--shots changes what a model is asked, and --predictions asks none; give one of them")
    if namespace.shots_image_root is not None and namespace.shots_table is None:
        raise ConfigError("--shots-image-root is given without --shots-table; add it, or remove the folder")
    from evaluation.few_shot import Shots

    return Shots(namespace.shots, namespace.shots_table, namespace.shots_seed or 0, namespace.shots_image_root)
