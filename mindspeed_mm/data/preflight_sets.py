"""Check-data: a whole set, its records and how it goes with the rest of the data config, as training would find it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mindspeed_mm import registry
from mindspeed_mm.data.auxiliary import check_auxiliary
from mindspeed_mm.data.build import check_set, read_options, row_length
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.dataset import LEAST_JUDGED, Policies, set_length
from mindspeed_mm.data.prediction import PredictedSet, check_answerable
from mindspeed_mm.data.preflight import Check, Found, shared_records
from mindspeed_mm.data.set_config import DATASETS, BasicParameters
from mindspeed_mm.errors import ConfigError, DataError


def check_config(config: DataConfig, max_length: int, wanted_auxiliary: bool | None) -> None:
    """Raise ConfigError for settings that do not go together. `wanted_auxiliary`: what the objective says; None: it is
    not known."""
    if config.dataloader_param.packing:
        row_length(config.dataloader_param, max_length)
    given = bool(config.dataset_param.auxiliary_parameters)
    check_auxiliary(config, given if wanted_auxiliary is None else wanted_auxiliary)


def look_at_set(
    check: Check,
    config: DataConfig,
    basic: BasicParameters,
    *,
    preferences: bool | None,
    ask: Callable[[int, Any], Any],
    earlier: Sequence[Found],
    processes: int | None = None,
) -> Found:
    """What is found in one set.

    Args:
        preferences: whether the set has to hold pairs, None: either; those that are answered never have to.
        ask: raises DataError for a record that cannot be asked; called for sets that are answered.
        earlier: what was found in the sets before it.
    """
    damage: list[DataError] = []
    encoding = next(iter(check.encodings.values()))
    options = dataclasses.replace(read_options(config, encoding.template, encoding.media), problems=damage)
    kind = config.dataset_param.kind_of(basic)
    is_asked = isinstance(basic, PredictedSet)
    try:
        source = registry.find(DATASETS, kind, "DATASET", what="dataset_type")(basic, options)
    except DataError as error:  # the other sets can still be looked at
        found = Found()
        damage.append(error)
    else:
        if is_asked:
            check = dataclasses.replace(check, ask=ask, answers=basic.metric is not None)
        found = check.set_of(source, basic.data_path, processes=processes)
        found.pairs = bool(getattr(source, "pairs", False))
        shared_records(earlier, found, source)
        try:
            if is_asked:
                check_answerable(basic, source)
            wanted = found.pairs if preferences is None or is_asked else preferences
            check_set(basic.data_path, source, kind, encoding.media, wanted)
            if found.records and not is_asked:
                left = found.records - found.problems["left out"]
                set_length(basic.data_path, left, found.records, basic.repeat_time)
        except (ConfigError, DataError) as error:
            found.problem("settings", str(error))
    for problem in damage:
        found.problem("file", str(problem))
    return found


def look_at_skips(policies: Policies, sets: Sequence[tuple[BasicParameters, Found]]) -> None:
    """Note where more records of the trained sets are left out for an image than data.json allows. Training counts them
    over all sets together, and from LEAST_JUDGED samples on (data/build.py)."""
    trained = [one for one in sets if not isinstance(one[0], PredictedSet)]
    bad, records = (sum(getattr(found, name) for _, found in trained) for name in ("bad_images", "records"))
    if bad > policies.max_skip_percent / 100 * max(records, LEAST_JUDGED):
        basic, worst = max(trained, key=lambda one: one[1].bad_images)
        worst.problem(
            "settings",
            f"{basic.data_path}: {bad} of {records} records of all sets have no usable image, more than "
            f"max_skip_percent {policies.max_skip_percent:g} allows; bring the images back, or remove the records.",
        )
