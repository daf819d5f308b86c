"""What a family of models states: one family is one file of `models/families`, with a subclass of Family as FAMILY.

A family says which parts fill its slots, how its public folders name tensors and describe parts, how an image becomes
pixels and placeholders, and where tokens stand. Loading, conversion, verification, data and generation loop over
families and know none by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.config.file_keys import FileKeys
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.media import ItemPlan, MediaProcessor
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.operations import EncoderWork
from mindspeed_mm.models.part import SLOTS
from mindspeed_mm.weights.layouts import Layout

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec
    from mindspeed_mm.weights.sources import PartSource, Source


class Family(ABC):
    """One family of models. Methods that most families share are filled in as LLaVA has them."""

    name: str
    """model_id of a model.json."""

    model_types: tuple[str, ...]
    """HF model_type values of the whole models' config.json."""

    layouts: tuple[Layout, ...]
    """Public folders of whole models, the first being the one that stock transformers reads and writes."""

    model_ids: dict[str, str] = {}
    """The part that fills a slot, by slot, where a config names none (projectors have no model_type)."""

    slots: tuple[str, ...] = SLOTS
    """The slots that a model of the family has."""

    config_keys: dict[str, FileKeys] = {}
    """What is known of the keys of the whole model's config.json, by layout; `split_config` checks it."""

    template = "v1"
    """Conversation template of the family's models where neither the user nor the checkpoint nor its tokenizer gives
    one."""

    chats_by_tokenizer = True
    """Whether a chat template of the tokenizer is the model's; else it is that of the decoder alone, before it learned
    to see."""

    after_image = "\n"
    """What stands between an image and the question, where the user places none."""

    adds_image_token = True
    """Whether folders of transformers add `<image>` and `<pad>` to the decoder's vocabulary; else it has all tokens."""

    beside_text = False
    """Whether features stand beside the text, as memory for gated cross-attention, and a placeholder is one position;
    else they stand in it."""

    multimodal_positions = False
    """Whether positions have three axes (time, height, width), which `positions` gives."""

    def default_template(self, spec: ModelSpec) -> str:
        """The template of one model of the family."""
        return self.template

    def usual_template(self, spec: ModelSpec) -> tuple[str, bool]:
        """(`default_template`, `chats_by_tokenizer`): what choose_template asks of a family."""
        return self.default_template(spec), self.chats_by_tokenizer

    # Weights and configs

    def reads(self, config: dict[str, Any]) -> bool:
        """Whether a config.json is one of the family's."""
        return config.get("model_type") in self.model_types

    @abstractmethod
    def split_config(self, config: dict[str, Any], layout: str) -> dict[str, dict[str, Any] | None]:
        """A whole model's config.json as the HF config of each slot; None for a slot that it does not describe.

        Raises:
            ConfigError: the config asks for what the family does not have.
        """

    @abstractmethod
    def join_config(self, layout: str, specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a whole model, the other way round.

        Args:
            specs: the spec of each slot.
            dtype: of the weights, as HF names it.
            tokens: ids of special tokens by HF's keys, "image_token_id" among them.

        Raises:
            WeightError: the layout cannot hold such a model.
        """

    def other_parts(self, spec: ModelSpec) -> list[str]:
        """Problems of a spec whose slots hold other parts than the family names."""
        return [
            f'image_encoder.{slot}.model_id: found "{spec.part(slot).model_id}", expected "{name}", the {slot} of '
            f"model_id {self.name}"
            for slot, name in self.model_ids.items()
            if spec.part(slot).model_id != name
        ]

    def complete(self, source: Source, slots: dict[str, PartSource]) -> dict[str, PartSource]:
        """The parts of an opened source with those that lie elsewhere, named by its config."""
        return slots

    def check_keys(self, config: dict[str, Any], layout: str) -> None:
        """Refuse keys of a config.json that ask for what is not done here. Raises ConfigError."""
        if layout in self.config_keys:
            self.config_keys[layout].check(config)

    def stated(self, source: Source) -> dict[str, dict[str, Any]]:
        """Fields of the specs that the whole model's config states, by slot, where a part has no config of its own."""
        return {}

    def missing(self, source: Source, slot: str) -> str | None:
        """What to do about a slot that a source does not hold; None for the general advice."""
        return None

    def image_token_id(self, config: dict[str, Any]) -> int | None:
        """The id that stands at image positions in the input ids of the family's own processor; None: none does."""
        return config.get("image_token_id", config.get("image_token_index"))

    def placeholder_ids(self, config: dict[str, Any]) -> tuple[int, ...]:
        """All ids that stand for features in the input ids of the family's own processor."""
        found = self.image_token_id(config)
        return () if found is None else (found,)

    def pads(self, config: dict[str, Any]) -> bool:
        """Whether a config.json asks for images that are padded to squares first."""
        return False

    def processor_config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """processor_config.json of the family's transformers processor; None where it needs none."""
        return None

    def token_ids(self, token_to_id: Callable[[str], int | None]) -> dict[str, int]:
        """Ids of the family's own tokens by HF's config keys, from a tokenizer that knows them."""
        return {}

    def check_tokens(self, spec: ModelSpec, token_to_id: Callable[[str], int | None]) -> None:
        """Raise ConfigError where a tokenizer gives the family's own tokens other ids than the spec says."""
        return None

    def check(self, spec: ModelSpec) -> list[str]:
        """One sentence for each reason why the parts do not fit together, with the JSON path; empty where they do."""
        return []

    # Media

    @abstractmethod
    def media_processor(
        self,
        spec: ModelSpec,
        image_processor: dict[str, Any] | str | Path,
        *,
        pad: bool = False,
        fast_resize: bool = False,
    ) -> MediaProcessor:
        """How images become pixels and placeholders.

        Args:
            image_processor: a preprocessor_config.json: its content, the file or its folder.
            pad: pad images to squares first (LLaVA-1.5); families without such a choice refuse it.
            fast_resize: resize with torch's kernel.

        Raises:
            ConfigError: a processor of another family, or one whose images do not fit the vision encoder.
        """

    @abstractmethod
    def media_of_inputs(self, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
        """The media of what the family's transformers processor returns beside ids and mask; None for text alone.

        Raises:
            ConfigError: unknown inputs, or shapes that do not fit.
        """

    @abstractmethod
    def inputs_of_media(self, spec: ModelSpec, media: Media) -> dict[str, torch.Tensor]:
        """What the family's transformers processor returns beside ids and mask, for images alone."""

    def default_image_processor(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The preprocessor_config.json of a model that came with none; None where nothing can be assumed."""
        return None

    def fit_image_processor(self, spec: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
        """The preprocessor_config.json beside weights of another layout, as the family's transformers folder has it."""
        return config

    def gather(self, processor: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
        """A preprocessor_config.json with what else `media_processor` needs of the folders that weights came with, in
        one JSON, for places that keep no such files."""
        return processor

    def write_companions(self, folder: Path, processor: dict[str, Any]) -> None:
        """Write what `gather` has put into a processor's config as the family's transformers folder has it."""
        return None

    def fixed_plan(self, spec: ModelSpec) -> ItemPlan | None:
        """The plan that every image has; None where the size decides."""
        return None

    def planned_image(self, spec: ModelSpec) -> EncoderWork:
        """The work on the image that plans are made with where no data says how large images are."""
        plan = self.fixed_plan(spec)
        return replace(spec.vision_encoder.encoder_work(1, [plan.grid]), tokens=plan.count)

    # Positions

    def item_counts(self, spec: ModelSpec, media: Media) -> list[int]:
        """Features of each item, for families with multimodal positions."""
        raise NotImplementedError(f"family {self.name} has plain positions")

    def positions(self, spec: ModelSpec, input_ids: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Positions of one sequence with its placeholders expanded, for families with multimodal positions.

        Args:
            input_ids: [S] int64.
            grids: [I, 3] int64 of its items, as in Media.

        Returns:
            [3, S] int64: time, height and width. A text that goes on continues behind the largest of them.
        """
        raise NotImplementedError(f"family {self.name} has plain positions")


def media_of_data(spec: ModelSpec, config: DataConfig) -> MediaProcessor:
    """How the images of a data config become pixels and placeholders of a model. Raises ConfigError where they do not
    fit."""
    said, found = (
        config.dataset_param.mm_use_im_start_end,
        getattr(spec.vision_projector, "image_start_end", None) is not None,
    )
    if said is not None and said != found:
        raise ConfigError(
            f"dataset_param.mm_use_im_start_end is {str(said).lower()}, the model was trained "
            f"{'with' if found else 'without'} <im_start> and <im_end> around each image "
            "(image_encoder.vision_projector.image_start_end): leave the key out of data.json"
        )
    parameters = config.dataset_param.preprocess_parameters
    return spec.family.media_processor(
        spec, parameters.processor_source, pad=parameters.pad, fast_resize=parameters.fast_resize
    )
