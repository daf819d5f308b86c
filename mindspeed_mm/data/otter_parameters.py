"""The block `mimic_it` of a set in data.json (docs/data.md)."""

from __future__ import annotations

import pydantic

from mindspeed_mm.config.load import StrictModel


class MimicItParameters(StrictModel):
    """Where the images of Otter's instructions are, which records are read, and with which examples."""

    images: str | None = None
    """JSON {image id: base64}, or parquet with a column base64 beside the ids; None: records without images."""

    train_config: str | None = None
    """JSON {instruction id: [ids of its examples]}: its records alone are read, with these examples; None: all records
    and their rel_ins_ids."""

    in_context: bool = False
    """Whether a record's examples stand before it, as earlier turns."""

    shots: pydantic.PositiveInt | None = None
    """At most so many of its examples, drawn by sampling_seed; None: all."""

    frames: pydantic.PositiveInt | None = None
    """The images of a record are frames of one video under one `<image>`, at most so many of them, evenly spread; None:
    each image has its own."""

    num_samples: int = -1
    """So many records, drawn by sampling_seed, each as often as any other up to one; -1: each once."""

    clean_text: bool = True
    """Otter's clean-up: lower case, spaces for - and /, no marks in front, single spaces."""

    @pydantic.field_validator("num_samples")
    @classmethod
    def _some(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError(f"found {value}, expected -1 for all records, or a number of them from 1")
        return value

    @pydantic.model_validator(mode="after")
    def _shots_in_context(self) -> MimicItParameters:
        if self.shots is not None and not self.in_context:
            raise ValueError('"shots" is given without "in_context": true; add it, or remove "shots"')
        return self
