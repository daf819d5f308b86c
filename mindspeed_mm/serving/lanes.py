"""A model under several names: as it is, and with each of its adapters.

Each name has an engine of its own, so that no batch and no cache holds two adapters' values; all of them share the
weights. The orders below are all that changes an engine's course: ranks that take the same ones compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.generation.engine import GenerationEngine, GenerationHandle, GenerationRequest

if TYPE_CHECKING:
    from mindspeed_mm.inference.adapters import AdapterSwitch, AttachedAdapter


@dataclass(frozen=True)
class BeginOrder:
    """Take a request. `number` is its own among all of the server."""

    number: int
    model: str
    request: GenerationRequest
    options: Mapping[str, Any]


@dataclass(frozen=True)
class CancelOrder:
    """End a request before its time."""

    number: int


@dataclass(frozen=True)
class ReloadOrder:
    """Read the adapter of a name again."""

    model: str


Order = BeginOrder | CancelOrder | ReloadOrder


@dataclass(eq=False)
class Lane:
    """A name's engine, and the adapter that its steps need."""

    engine: GenerationEngine
    adapter: AttachedAdapter | None = None


class ModelLanes:
    """The engines of one model. Everything here happens in one thread."""

    def __init__(
        self,
        name: str,
        make_engine: Callable[[], GenerationEngine],
        adapters: AdapterSwitch | None = None,
        folders: Mapping[str, Path] | None = None,
        agree: Callable[[str | None], str | None] = lambda problem: problem,
    ) -> None:
        """`name` is the model without an adapter, `folders` an adapter by each other name, which `adapters` reads.
        `agree` tells what is wrong on any of the ranks, see RankChannel.

        Raises:
            WeightError, ConfigError: an adapter cannot be used, see AdapterSwitch.attach.
        """
        self._make_engine, self._adapters, self._agree = make_engine, adapters, agree
        self._folders = dict(folders or {})
        self._lanes = {name: Lane(make_engine())}  # first, while the plain linears are all that there is
        self._handles: dict[int, GenerationHandle] = {}
        self._leaving: list[Lane] = []
        """Lanes of adapters that were read again meanwhile: what runs there ends there."""
        self._turn = 0
        for own, folder in self._folders.items():
            attached = adapters.attach(folder)
            self._lanes[own] = Lane(make_engine(), attached)

    @property
    def names(self) -> list[str]:
        """What requests may call the model, the one without an adapter first."""
        return list(self._lanes)

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return any(lane.engine.busy for lane in self._all())

    def engine(self, model: str) -> GenerationEngine:
        """The engine of a name."""
        return self._lanes[model].engine

    def take(self, order: Order, **hooks: Callable[..., None]) -> GenerationHandle | None:
        """Carry out an order; `hooks` (on_text, on_end) are those of GenerationEngine.submit. The handle of a request
        that began.

        Raises:
            WeightError, ConfigError: an adapter cannot be read again, on any rank; the one before stays.
        """
        match order:
            case BeginOrder():
                return self._begin(order, hooks)
            case CancelOrder():
                if order.number in self._handles:
                    self._handles[order.number].cancel()
            case ReloadOrder():
                self._reload(order.model)
        return None

    def step(self) -> None:
        """One step of the next busy engine in turn, with its adapter."""
        busy = [lane for lane in self._all() if lane.engine.busy]
        if busy:
            self._turn += 1
            lane = busy[self._turn % len(busy)]
            if self._adapters is not None:
                self._adapters.use(lane.adapter)
            lane.engine.step()
        self._leaving = [lane for lane in self._leaving if lane.engine.busy]

    def renew(self) -> None:
        """New engines, without the requests of the old ones."""
        self._leaving, self._handles = [], {}
        for lane in self._lanes.values():
            lane.engine = self._make_engine()

    def _all(self) -> list[Lane]:
        return [*self._lanes.values(), *self._leaving]

    def _begin(self, order: BeginOrder, hooks: Mapping[str, Callable[..., None]]) -> GenerationHandle:
        def end(handle: GenerationHandle) -> None:
            self._handles.pop(order.number, None)
            if "on_end" in hooks:
                hooks["on_end"](handle)

        engine = self.engine(order.model)
        handle = engine.submit(order.request, order.options, on_text=hooks.get("on_text"), on_end=end)
        if handle.result is None:
            self._handles[order.number] = handle
        return handle

    def _reload(self, model: str) -> None:
        if model not in self._folders:
            raise ConfigError(f"{model!r} is no adapter: there is nothing to read again")
        attached, problem = None, None
        try:
            attached = self._adapters.attach(self._folders[model])
        except (WeightError, ConfigError, OSError) as error:
            problem = str(error)
        problem = self._agree(problem)
        if problem is not None:
            raise WeightError(problem)
        self._leaving.append(self._lanes[model])
        self._lanes[model] = Lane(self._make_engine(), attached)
