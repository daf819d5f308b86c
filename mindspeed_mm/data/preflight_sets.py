"""Check-data: a whole set, its records and how it goes with the rest of the data config, as training would find it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mindspeed_mm import registry
from mindspeed_mm.data.auxiliary import check_auxiliary
from mindspeed_mm.data.build import check_set, read_options, row_length
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.dataset import set_length
from mindspeed_mm.data.prediction import PredictedSet
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
    ask: Callable[[int, Any], Any] | None,
    earlier: Sequence[Found],
    processes: int | None = None,
) -> Found:
    """What is found in one set.

    Args:
        preferences: whether the set has to hold pairs, None: either; those that are answered never have to.
        ask: raises DataError for a record that cannot be asked, of sets that are answered.
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
        preferences = not is_asked and (found.pairs if preferences is None else preferences)
        shared_records(earlier, found, source)
        try:
            check_set(basic.data_path, source, kind, encoding.media, preferences)
            if found.records:
                _check_what_is_left(check, found, basic)
        except (ConfigError, DataError) as error:
            found.problem("settings", str(error))
    for problem in damage:
        found.problem("file", str(problem))
    return found


def _check_what_is_left(check: Check, found: Found, basic: BasicParameters) -> None:
    """Raise DataError where nothing of a set can be trained on, or more is left out for an image than data.json
    allows."""
    bad, most = found.bad_images, check.policies.max_skip_percent
    if bad and (bad == found.records or bad > most / 100 * found.records):
        raise DataError(
            f"{basic.data_path}: {bad} of {found.records} records have no usable image, more than max_skip_percent "
            f"{most:g} allows; bring the images back, or remove the records."
        )
    usable = found.records - (found.problems["left out"] - bad)
    set_length(basic.data_path, usable, found.records, basic.repeat_time)
