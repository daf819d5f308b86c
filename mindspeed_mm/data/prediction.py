"""`prediction` of a data.json: sets that a trained model answers, each with its metric (docs/grounding.md)."""

from __future__ import annotations

import re
from typing import Any, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel
from mindspeed_mm.data.set_config import BasicParameters
from mindspeed_mm.errors import ConfigError

NAME = re.compile(r"[\w.-]+", re.ASCII)
"""Of a set of `multitest`: it stands in the names of files."""


class PredictedSet(BasicParameters):
    """A set whose last answers are asked of the model."""

    metric: Literal["rec", "exact", "point_qa", "caption"] | None = None
    """rec: the box, right above an IoU of 0.5; exact: the words behind "the answer is"; point_qa: these up to a dot;
    caption: BLEU and CIDEr; None: the answers are written and not judged."""

    lenient: bool = False
    """Of rec: also read a box with spaces, a minus sign and the like (grounding/notation.parse_lenient), and say how
    often that was needed."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> PredictedSet:
        for name, usual in (("repeat_time", 1), ("weight", None), ("name", None)):
            if getattr(self, name) != usual:
                raise ValueError(
                    f'has "{name}", which is of sets that are trained on; remove it: every record is asked'
                )
        if self.lenient and self.metric != "rec":
            raise ValueError(f'has "lenient", which the metric rec reads, and the metric is {self.metric}; remove it')
        return self


def check_answerable(chosen: PredictedSet, source: Any) -> None:
    """Raise ConfigError for a set whose records are preference pairs."""
    if getattr(source, "pairs", False):
        raise ConfigError(f"{chosen.data_path} holds preference records, which have no one answer; give conversations")


class Prediction(StrictModel):
    """Which sets are answered, in the words of Hugging Face's trainer."""

    eval: PredictedSet | None = None
    """Of --do-eval."""

    test: PredictedSet | None = None
    """Of --do-predict."""

    multitest: dict[str, PredictedSet] = {}
    """Of --do-multi-predict, by name."""

    generation: dict[str, Any] = {}
    """Names of transformers' GenerationConfig; default: greedy, at most 128 new tokens."""

    @pydantic.field_validator("multitest")
    @classmethod
    def _file_names(cls, value: dict[str, PredictedSet]) -> dict[str, PredictedSet]:
        bad = [name for name in value if NAME.fullmatch(name) is None]
        if bad:
            raise ValueError(f"found the name {bad[0]!r:.60}; expected letters, digits, dots and dashes")
        return value

    def sets(self) -> dict[str, PredictedSet]:
        """All of them, by the prefix of their files."""
        single = {name: found for name, found in (("eval", self.eval), ("test", self.test)) if found is not None}
        return single | {f"multitest_{name}": found for name, found in self.multitest.items()}
