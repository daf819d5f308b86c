"""What the runner asks of a text generator; mindspeed_mm.generation is one, a test's dictionary another."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import PIL.Image


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt: either (question, answer) pairs whose last answer is None, for a template, or the finished text.

    Both hold one `<image>` per picture; `images` are in reading order and in any PIL mode.
    """

    id: int | str
    turns: tuple[tuple[str, str | None], ...] | None
    text: str | None
    images: tuple[PIL.Image.Image, ...]


class Engine(Protocol):
    """Generates answers."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterable[tuple[int | str, str]]:
        """Answer a batch of requests: (id, answer text without the prompt), each id once, in any order."""

    def describe(self) -> dict[str, Any]:
        """What the answers depend on, as JSON values: model and weights, template, decoding options, dtype."""


class Communicator(Protocol):
    """The two exchanges between ranks that the runner needs."""

    rank: int
    world_size: int

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank; also a barrier."""


class SingleRank:
    """Communicator of a run with one process."""

    rank = 0
    world_size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]
