"""What scoring asks of a judge."""

from collections.abc import Mapping
from typing import Protocol


class Judge(Protocol):
    """Reads answers that no rule can read."""

    def pick(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """Letter of the option that the answer claims, or None if it claims none."""
