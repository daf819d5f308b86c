"""A model that is spread over the ranks of a torchrun launch: rank 0 answers, the others take the same steps."""

from __future__ import annotations

import contextlib
import datetime
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from mindspeed_mm.ending import END_SIGNALS
from mindspeed_mm.errors import ConfigError, LostRankError, WeightError
from mindspeed_mm.generation.engine import GenerationEngine
from mindspeed_mm.inference.adapters import AdapterSwitch
from mindspeed_mm.inference.loaded import LoadedVLM
from mindspeed_mm.serving.lanes import ModelLanes, Order

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""How often rank 0 says that it is there while there is nothing to do. It learns by that, too, that another one has
gone, where no torchrun tells it. A beat takes no processor time to speak of (under 1 ms)."""

SILENCE = datetime.timedelta(minutes=30)
"""A rank that says nothing for so long has failed. One that ends is known at once, by its connection."""


class RankChannel:
    """What rank 0 tells the others, in a group of its own on the CPU. Every rank makes one at the same point."""

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo", timeout=SILENCE)
        self.first = torch.distributed.get_rank() == 0

    def tell(self, orders: Sequence[Order], *, step: bool) -> None:
        """From rank 0: what comes next."""
        self._share((tuple(orders), step))

    def end(self) -> None:
        """From rank 0: there is nothing more to come."""
        self._share(None)

    def hear(self) -> tuple[tuple[Order, ...], bool] | None:
        """On the other ranks: the orders of a turn and whether a step follows them; None at the end."""
        return self._share(None)

    def agree(self, problem: str | None) -> str | None:
        """The first rank's problem of all that have one; None where no rank has one."""
        found: list[str | None] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(found, problem, group=self._group)
        return next((each for each in found if each is not None), None)

    def _share(self, turn: tuple[tuple[Order, ...], bool] | None) -> tuple[tuple[Order, ...], bool] | None:
        held = [turn]
        torch.distributed.broadcast_object_list(held, src=0, group=self._group)
        return held[0]


def joined_lanes(
    vlm: LoadedVLM, name: str, make_engine: Callable[[], GenerationEngine], folders: Mapping[str, Path]
) -> tuple[ModelLanes, RankChannel | None]:
    """The lanes of a model and its adapters, and the channel between its ranks; None where it is on one.

    Raises:
        WeightError, ConfigError: an adapter cannot be used, see AdapterSwitch.attach.
    """
    config = vlm.model.config
    channel = RankChannel() if config.tensor_model_parallel_size * config.pipeline_model_parallel_size > 1 else None
    adapters = AdapterSwitch(vlm) if folders else None
    agree = {} if channel is None else {"agree": channel.agree}
    return ModelLanes(name, make_engine, adapters, folders, **agree), channel


def follow(lanes: ModelLanes, channel: RankChannel) -> None:
    """Take the steps of rank 0 until it ends. A signal to all ranks ends rank 0, which ends this one.

    Raises:
        LostRankError: another rank is lost, or a step failed.
    """
    with _deaf():
        try:
            while (turn := channel.hear()) is not None:
                orders, step = turn
                for order in orders:
                    try:
                        lanes.take(order)
                    except (ConfigError, WeightError):
                        logger.debug("rank 0 answers for %r", order)
                if step:
                    lanes.step()
        except RuntimeError as error:  # torch's
            raise lost_rank(error) from error


def lost_rank(error: RuntimeError) -> LostRankError:
    """What a failed exchange or step means to all ranks."""
    first = str(error).strip().partition("\n")[0]
    told = f"a rank is lost or a step failed ({first[:300]}): start all ranks of this server again"
    return LostRankError("\n  ".join([told, *getattr(error, "__notes__", ())]))


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
