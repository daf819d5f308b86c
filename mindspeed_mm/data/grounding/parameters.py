"""The block `grounding` of a set in data.json (docs/grounding.md)."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel
from mindspeed_mm.data.grounding.notation import Notation, notation
from mindspeed_mm.errors import ConfigError

KINDS = (
    *("grounding", "rec", "reg", "caption", "flickr30k", "flickr30k_reverse", "gqa", "vqa_v2", "vqa_e", "vqa_x"),
    *("pope", "point_qa_local", "point_qa_twice", "v7w_point", "gpt4gen", "clevr", "vcr", "science_qa"),
)
"""Dataset kinds that read the block."""

OF_ALL = ("notation", "precision", "normalised")
"""Keys that each of them reads."""


class GroundingParameters(StrictModel):
    """How boxes and points are given and written, and how public records become questions and answers."""

    notation: Literal["square", "round", "bins", "minigpt_v2", "qwen2_vl", "internvl"] = "square"
    """The text that a box becomes."""

    precision: pydantic.NonNegativeInt | None = None
    """Decimals between brackets; default 3."""

    normalised: bool = False
    """Whether the records' boxes are fractions of the image instead of pixels."""

    template_string: str | None = None
    """The question, with its placeholders; None: a plain one of the kind."""

    template_file: str | None = None
    """A JSON list of questions, one of which is chosen for each record."""

    max_dynamic_size: pydantic.PositiveInt | None = None
    """Take so many questions from the head of the file."""

    fixed_template: bool = False
    """Always the first question, as an evaluation needs it."""

    seed: pydantic.NonNegativeInt = 0
    """Of what is chosen by chance: by record and seed, the same in every run and on every rank."""

    version: str | None = None
    """What of a record is asked and answered, where a kind has several ways."""

    box_max_num: pydantic.PositiveInt = 5
    """flickr30k_reverse: most phrases whose box stands in the question."""

    caption_with_box: Literal["none", "all", "question"] = "none"
    """flickr30k_reverse: the boxes of the caption: none, all, or those of the question."""

    caption_min_words: pydantic.NonNegativeInt | None = None
    """reg: expressions have more words than this."""

    caption_max_words: pydantic.PositiveInt | None = None
    """reg: expressions have fewer words than this."""

    each_answer: bool = False
    """vcr, versions qa-r and qac-r: a record is taken four times, with each of its answers as the one that is given."""

    question_box_prob: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """gqa, version qbp: how often a question has its boxes."""

    scene_graphs: str | None = None
    """gqa, clevr: JSONL of scene graphs, one image a line."""

    scene_graph_index: str | None = None
    """gqa: a JSON object, image id -> line of scene_graphs; None: the lines are read once and hold "image_id"."""

    @pydantic.model_validator(mode="after")
    def _known(self) -> GroundingParameters:
        notation(self.notation, self.precision)
        least, most = self.caption_min_words, self.caption_max_words
        if most is not None and most - 1 <= (least or 0):
            raise ValueError(
                f"caption_min_words {least or 0} and caption_max_words {most} leave no length between them; both are "
                "bounds that are not reached"
            )
        return self

    @property
    def style(self) -> Notation:
        """The notation."""
        return notation(self.notation, self.precision)

    def refuse_unused(self, kind: str, uses: tuple[str, ...]) -> None:
        """Raise ConfigError for a key that was given and that `kind` does not read."""
        unused = sorted(self.model_fields_set - {*OF_ALL, *uses})
        if unused:
            raise ConfigError(
                f"dataset_type {kind} does not read grounding.{', grounding.'.join(unused)}; it reads "
                f"{', '.join((*OF_ALL, *uses))}. Remove the key"
            )
