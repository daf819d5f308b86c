"""Conversations that are trained on beside preference pairs, one for each pair: data.json's auxiliary_parameters.

HA-DPO's MiniGPT-4 gives each pair a caption of cc_sbu_align, whose own loss keeps the training stable. There every rank
walks through its share of the file again and again; here the conversations have an order of their own, so that a pair's
companion depends on its place in the run alone, whatever the number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mindspeed_mm.data.sampler import EpochOrder, Order
from mindspeed_mm.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_mm.data.config import DataConfig
    from mindspeed_mm.data.dataset import MultimodalDataset


class Beside(NamedTuple):
    """A pair and its companion, as indices of their data sets."""

    pair: int
    companion: int


class AccompaniedOrder:
    """An order of pairs, each with the next companion."""

    def __init__(self, order: Order, companions: Order) -> None:
        self._order, self._companions = order, companions

    def at(self, position: int) -> Beside:
        pair, companion = self._order.at(position), self._companions.at(position)
        assert isinstance(pair, int) and isinstance(companion, int)
        return Beside(pair, companion)


def accompanied(order: Order, companions: MultimodalDataset, *, seed: int, shuffle: bool) -> AccompaniedOrder:
    """An order of pairs with the conversations of a data set beside them, each of which comes once before any comes
    again."""
    return AccompaniedOrder(order, EpochOrder(len(companions), seed=seed, shuffle=shuffle))


def check_auxiliary(config: DataConfig, wanted: bool) -> None:
    """Raise ConfigError where a data config has auxiliary sets and the objective wants none, or the other way round, or
    where they do not go with how rows are made."""
    given = bool(config.dataset_param.auxiliary_parameters)
    if given and not wanted:
        raise ConfigError(
            "the data config has auxiliary_parameters, which this objective does not read: give the objective dpo an "
            "auxiliary_weight above 0 (--pref-auxiliary-weight), or remove them"
        )
    if wanted and not given:
        raise ConfigError(
            "auxiliary_weight is above 0, and the data config has no auxiliary_parameters, whose conversations it "
            "weighs: add the sets, or leave auxiliary_weight out"
        )
    weighted = next((basic for basic in config.dataset_param.auxiliary_parameters if basic.weight is not None), None)
    if weighted is not None:
        raise ConfigError(
            f"{weighted.data_path} in auxiliary_parameters has a weight, and each of their conversations comes once "
            "before any comes again: give repeat_time instead"
        )
    if given and config.dataloader_param.packing:
        raise ConfigError(
            "packing does not go with auxiliary_parameters, since the length of a row would depend on which "
            "conversation comes beside a pair: set packing to false (the pairs of a micro-batch share a row anyway)"
        )
