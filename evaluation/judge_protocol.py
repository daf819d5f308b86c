"""What scoring asks of a judge."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Judge(Protocol):
    """Reads answers that no rule can read."""

    def pick(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """Letter of the option that the answer claims, or None if it claims none."""


class SentenceJudge(Protocol):
    """Says of each sentence of a description whether it is true."""

    def verdicts(
        self, image_id: str, sentences: Sequence[str], prompt: str, is_read: Callable[[str], bool]
    ) -> str | None:
        """A reply to `prompt`, which shows the sentences; asked for again while `is_read` refuses it, so that only the
        last of several is a refused one. None where there is no reply for this image."""
