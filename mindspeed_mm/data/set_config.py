"""One set of a data.json: its file, the folder of its images, and what its kind reads besides."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm import registry
from mindspeed_mm.config.load import StrictModel
from mindspeed_mm.data.grounding.parameters import KINDS, GroundingParameters
from mindspeed_mm.data.otter_parameters import MimicItParameters

DATASETS = "mindspeed_mm.data.datasets"
"""The package whose modules are the dataset kinds."""

DATASET_TYPES = {"multimodal": "llava", "image": "llava"}
"""MindSpeed-MM's names (2.0 and 1.0) of the dataset kinds here."""


READ_BY = {
    "image_data": ("ha_dpo",),
    "sampling_seed": ("ha_dpo", "mimic_it"),
    "grounding": KINDS,
    "mimic_it": ("mimic_it",),
}
"""Keys of a set that some dataset kinds alone read."""


def only(*allowed: Any, reason: str) -> pydantic.AfterValidator:
    """Accept the listed values, refuse others with the reason."""

    def check(value: Any) -> Any:
        if value not in allowed:
            shown = " or ".join(repr(item) for item in allowed)
            raise ValueError(f"found {value!r}, expected {shown}: {reason}")
        return value

    return pydantic.AfterValidator(check)


def known_dataset(value: str) -> str:
    """Check a dataset_type."""
    known = [*DATASET_TYPES, *registry.available(DATASETS)]
    if value not in known:
        raise ValueError(f'found "{value}", expected one of: {", ".join(known)}')
    return value


class BasicParameters(StrictModel):
    """One data file (or tar shards) and the folder of its images."""

    data_path: str
    data_folder: str = ""
    """Image names are relative to this folder and stay inside it; may be left out for text-only data."""

    repeat_time: float = 1
    """How often the file counts: a whole number, or a share below 1 (that part from the start of the file)."""

    weight: pydantic.PositiveFloat | None = None
    """Share of the samples that come from this set, relative to the other sets' weights; all sets have one or none has.
    Without weights, an epoch holds every set as often as its repeat_time says."""

    dataset_type: str | None = None
    """The format of this set where it is not the one of dataset_param."""

    image_data: str | None = None
    """Of ha_dpo: Visual Genome's image_data.json; default: the one in data_folder."""

    sampling_seed: pydantic.NonNegativeInt | None = None
    """Of ha_dpo: which of several answers are drawn; of mimic_it: which records and examples; default 42."""

    hadpo_model: Literal["llava", "minigpt4", "instructblip"] | None = None
    """Of ha_dpo: the model whose recipe says which rows are read and how; default llava."""

    caption_processor: Literal["blip_caption"] | None = None
    """Of tar: captions in lower case and without marks, as MiniGPT-4 takes them; None: as they are."""

    grounding: GroundingParameters | None = None
    """Of kinds with boxes: how these are given and written, and how records become questions."""

    mimic_it: MimicItParameters | None = None
    """Of mimic_it: where its images are, which records are read, and with which examples."""

    name: str | None = None
    """What `mixing` calls the set; its number does as well."""

    return_type: Annotated[str | None, only(None, "list", reason="records are read one by one")] = None
    data_storage_mode: Annotated[str, only("standard", reason="JSON and JSONL files are read")] = "standard"

    @pydantic.field_validator("dataset_type")
    @classmethod
    def _known_dataset(cls, value: str | None) -> str | None:
        return None if value is None else known_dataset(value)

    @pydantic.field_validator("repeat_time")
    @classmethod
    def _whole_or_share(cls, value: float) -> float:
        if value <= 0 or (value > 1 and value != int(value)):
            raise ValueError(f"found {value}, expected a share above 0 and below 1, or a whole number")
        return value
