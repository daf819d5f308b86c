"""What the runner asks of a text generator; mindspeed_mm.generation is one, a test's dictionary another."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import PIL.Image


@dataclass(frozen=True)
class EvaluationRequest:
    """One prompt: either (question, answer) pairs whose last answer is None, for a template, or the finished text.

    Both hold one `<image>` per image.
    """

    id: int | str
    turns: tuple[tuple[str, str | None], ...] | None
    text: str | None
    image: str
    """Equal for requests on the same images, which stand next to each other."""
    images: Callable[[], tuple[PIL.Image.Image, ...]]
    """Decodes the images, in reading order and any PIL mode. To be called when the request's turn comes, from any
    thread; raises DataError."""


class Engine(Protocol):
    """Generates answers."""

    def generate(self, requests: Sequence[EvaluationRequest], batch_size: int) -> Iterable[tuple[int | str, str]]:
        """Answer requests, `batch_size` at a time: (id, answer text without the prompt), each id once, as they come.

        Answers do not depend on the batch size or the order. Raises DataError for one that cannot be answered.
        """

    def describe(self) -> dict[str, Any]:
        """What the answers depend on, as JSON values: model and weights, template, decoding options, dtype."""


class Communicator(Protocol):
    """What the runner needs to know of the ranks, and the exchange between them."""

    rank: int
    world_size: int
    replica: int
    """Which copy of the model this rank belongs to: ranks of one copy (tensor and pipeline parallelism) answer the same
    questions."""
    replicas: int
    """Copies of the model; the questions are divided among them."""
    is_leader: bool
    """Whether this rank writes down the answers of its copy."""

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank; also a barrier."""

    def count(self, answers: int) -> int:
        """Add to the number of answers of this launch, and say how many there are so far on all ranks. No barrier."""


class SingleRank:
    """Communicator of a run with one process."""

    rank = replica = 0
    world_size = replicas = 1
    is_leader = True

    def __init__(self) -> None:
        self._answers = 0

    def all_gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def count(self, answers: int) -> int:
        """The answers of this process."""
        self._answers += answers
        return self._answers
