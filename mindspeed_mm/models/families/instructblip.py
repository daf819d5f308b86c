"""InstructBLIP (Dai et al. 2023): BLIP-2 whose Q-Former reads the question as well, with words of its own.

The folders are those of transformers' InstructBlipForConditionalGeneration around a decoder (Vicuna, Llama, OPT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.config.load import read_json
from mindspeed_mm.data.image import ImageProcessor, config_file
from mindspeed_mm.data.instructed_images import (
    FOLDER,
    InstructedImages,
    read_question_tokenizer,
    write_question_tokenizer,
)
from mindspeed_mm.data.media import MediaProcessor
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.families.blip2 import Blip2, folder_layout
from mindspeed_mm.models.media import Media

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec

NAME = "instructblip"

INSTRUCTBLIP = folder_layout(
    NAME,
    (r"^language_projection\.", r"^qformer\.embeddings\.", r"^query_tokens$", r"^language_model\."),
    "instructblip",
)


class InstructBlip(Blip2):
    """See the module."""

    name = NAME
    model_types = ("instructblip",)
    layouts = (INSTRUCTBLIP,)
    template = "instructblip"
    config_keys = {NAME: config_keys.BLIP2}
    architecture = "InstructBlipForConditionalGeneration"
    processor_class = "InstructBlipProcessor"
    inputs = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    reads_instructions = True

    def media_processor(
        self,
        spec: ModelSpec,
        image_processor: dict[str, Any] | str | Path,
        *,
        pad: bool = False,
        fast_resize: bool = False,
    ) -> MediaProcessor:
        """The tokenizer of the question lies in a folder beside the processor's config, or in the config itself."""
        if isinstance(image_processor, dict):
            plain = {key: value for key, value in image_processor.items() if key != FOLDER}
            content = image_processor.get(FOLDER)
        else:
            file = config_file(Path(image_processor))
            plain, content = read_json(file), read_question_tokenizer([file.parent])
            plain = plain.get("image_processor", plain)
            plain, content = {k: v for k, v in plain.items() if k != FOLDER}, plain.get(FOLDER, content)
        super().media_processor(spec, plain, pad=pad, fast_resize=fast_resize)  # raises where it does not fit
        most = spec.vision_projector.text_positions
        processor = ImageProcessor.from_config(plain)
        return InstructedImages(processor, self.tokens_per_image(spec), content, most, fast_resize=fast_resize)

    def media_of_inputs(self, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
        """qformer_input_ids and qformer_attention_mask are [images, L], the mask 0 at padding."""
        media = super().media_of_inputs(spec, inputs)
        ids, mask = inputs.get("qformer_input_ids"), inputs.get("qformer_attention_mask")
        if ids is None and mask is None:
            return media
        if media is None or ids is None:
            raise ConfigError(f"model_id {self.name} takes pixel_values and qformer_input_ids together")
        mask = torch.ones_like(ids) if mask is None else mask
        if ids.shape != mask.shape or len(ids) != len(media):
            raise ConfigError(
                f"found qformer_input_ids of shape {list(ids.shape)}, qformer_attention_mask of {list(mask.shape)} and "
                f"{len(media)} images; expected both [{len(media)}, L], one question for each image"
            )
        rows = zip(ids.cpu(), mask.cpu().bool(), strict=True)
        return replace(media, instructions=tuple(tuple(row[kept].tolist()) for row, kept in rows))

    def inputs_of_media(self, spec: ModelSpec, media: Media) -> dict[str, torch.Tensor]:
        """Images alone have the padding word as their question."""
        pad = spec.vision_projector.text_pad_token_id
        asked = media.instructions or ((pad,),) * len(media)
        ids = torch.full((len(asked), max(map(len, asked))), pad)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(asked):
            ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
        return {"pixel_values": media.pixels, "qformer_input_ids": ids, "qformer_attention_mask": mask}

    def gather(self, processor: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
        content = processor.get(FOLDER) or read_question_tokenizer(list(folders))
        return processor if content is None else processor | {FOLDER: content}

    def write_companions(self, folder: Path, processor: dict[str, Any]) -> None:
        if FOLDER in processor:
            write_question_tokenizer(folder, processor[FOLDER])

    def fit_image_processor(self, spec: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != FOLDER}


FAMILY = InstructBlip()
"""The family."""
