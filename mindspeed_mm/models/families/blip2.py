"""BLIP-2 (Li et al. 2023): EVA-CLIP, a Q-Former that makes a fixed number of features of an image, any decoder.

The folders are those of transformers' Blip2ForConditionalGeneration with a decoder behind it (OPT, Llama, ...). Models
around Flan-T5, which is an encoder and a decoder, are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.media import FixedSizeImages, ItemPlan, MediaProcessor
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.families.llava import fit_problems, refuse_inputs, sized_processor, square_images
from mindspeed_mm.models.family import Family
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.part import find_part, part_block, part_of
from mindspeed_mm.models.vision_projector.qformer import PREFIXES
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION, Layout, Prefix

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec
    from mindspeed_mm.weights.sources import Source

NAME = "blip2"


def folder_layout(name: str, markers: tuple[str, ...], dialect: str) -> Layout:
    """The layout of transformers' folders; `dialect` is that of the projector's names."""
    return Layout(
        name,
        markers,
        (Prefix("language_model.", TEXT), Prefix("vision_model.", VISION), *PREFIXES),
        {TEXT: "hf", VISION: "hf", PROJECTOR: dialect},
        {TEXT: "language_model.", VISION: "vision_model.", PROJECTOR: ""},
        {TEXT: "language_model.", VISION: "vision_model.", PROJECTOR: ""},
    )


BLIP2 = folder_layout(
    NAME, (r"^language_projection\.", r"^qformer\.layernorm\.", r"^query_tokens$", r"^language_model\."), "hf"
)

ENCODER_DECODERS = ("t5", "flan_t5", "mt5")
"""model_types of decoders that are not decoders alone."""


class Blip2(Family):
    """See the module."""

    name = NAME
    model_types = ("blip-2",)
    layouts = (BLIP2,)
    model_ids = {VISION: "eva_vit", PROJECTOR: "qformer"}
    template = "blip2"
    config_keys = {NAME: config_keys.BLIP2}
    chats_by_tokenizer = False
    architecture = "Blip2ForConditionalGeneration"
    processor_class = "Blip2Processor"
    inputs: tuple[str, ...] = ("pixel_values",)
    """What the processor returns beside ids and mask."""
    reads_instructions = False
    """Whether the Q-Former takes the question."""

    def split_config(self, config: dict[str, Any], layout: str) -> dict[str, dict[str, Any] | None]:
        kind = config.get("model_type", self.model_types[0])
        if kind not in self.model_types:
            raise ConfigError(
                f'config.json: found model_type "{kind}" with tensors of layout {layout}; expected '
                f"{' or '.join(self.model_types)}. Give weights of a supported model."
            )
        self.check_keys(config, layout)
        text = config.get("text_config") or {}
        if text.get("model_type") in ENCODER_DECODERS or text.get("is_encoder_decoder"):
            raise ConfigError(
                f'config.json: found the text model "{text.get("model_type")}" (Flan-T5), an encoder and a decoder; '
                "expected a decoder alone, such as OPT, Vicuna or Llama. Give weights of a model with one of these."
            )
        for key in ("vision_config", "qformer_config", "text_config"):
            if not isinstance(config.get(key), dict):
                raise ConfigError(f"config.json: {key} is missing; copy the whole file of the model.")
        text = {"model_type": "opt", **text}
        return {TEXT: text, VISION: config["vision_config"], PROJECTOR: {"model_type": kind, **config}}

    def join_config(self, layout: str, specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
        text, projector = specs[TEXT], specs[PROJECTOR]
        kept = {key: value for key, value in tokens.items() if key not in ("rows", "image_token_id")}
        rows = {} if tokens.get("rows") is None else {"vocab_size": tokens["rows"]}
        own = {
            "qformer_config": part_of(PROJECTOR, projector).to_hf(projector, dtype),
            "text_config": part_of(TEXT, text).to_hf(text, dtype) | kept | rows,
            "vision_config": part_of(VISION, specs[VISION]).to_hf(specs[VISION], dtype),
        }
        own["vision_config"] |= {
            "model_type": own["qformer_config"]["model_type"].replace("_qformer", "_vision_model"),
            "layer_norm_eps": projector.vision_norm_epsilon,
        }
        return {
            "architectures": [self.architecture],
            "model_type": self.model_types[0],
            **own,
            "image_token_index": tokens.get("image_token_id"),
            "num_query_tokens": projector.num_query_tokens,
            "tie_word_embeddings": text.share_embeddings_and_output_weights,
            "use_decoder_only_language_model": True,
            "torch_dtype": dtype,
        }

    def stated(self, source: Source) -> dict[str, dict[str, Any]]:
        """The projector, which has no config of its own."""
        part = source.part_sources.get(PROJECTOR)
        if part is None or not part.config:
            return {}
        spec = find_part(PROJECTOR, part.model_id).read_config(part.config, part.dialect)
        return {PROJECTOR: part_block(PROJECTOR, spec)}

    def processor_config(self, spec: ModelSpec) -> dict[str, Any] | None:
        return {"processor_class": self.processor_class, "num_query_tokens": self.tokens_per_image(spec)}

    def tokens_per_image(self, spec: ModelSpec) -> int:
        """Features of an image behind the projector."""
        return spec.vision_projector.num_query_tokens

    def check(self, spec: ModelSpec) -> list[str]:
        if problems := self.other_parts(spec):
            return problems
        encoder, projector, decoder = spec.vision_encoder, spec.vision_projector, spec.text_decoder
        problems = fit_problems(spec)
        if projector.reads_instructions != self.reads_instructions:
            found, wanted = ("a", "none") if projector.reads_instructions else ("no", "both")
            problems.append(
                f"image_encoder.vision_projector: found {found} text branch; expected {wanted} of text_vocab_size and "
                f"text_positions, since the Q-Former of model_id {self.name} takes "
                f"{'the question' if self.reads_instructions else 'no question'}"
            )
        if encoder.layernorm_epsilon != projector.vision_norm_epsilon:
            problems.append(
                f"image_encoder.vision_projector.vision_norm_epsilon: found {projector.vision_norm_epsilon}, expected "
                f"{encoder.layernorm_epsilon}, the vision_encoder's layernorm_epsilon, which is one number in "
                "transformers' config"
            )
        if self.tokens_per_image(spec) >= decoder.language_max_sequence_length:
            problems.append(
                f"text_decoder.language_max_sequence_length: found {decoder.language_max_sequence_length}, expected "
                f"more than the {self.tokens_per_image(spec)} tokens of one image"
            )
        return problems

    def media_processor(
        self,
        spec: ModelSpec,
        image_processor: dict[str, Any] | str | Path,
        *,
        pad: bool = False,
        fast_resize: bool = False,
    ) -> MediaProcessor:
        if pad:
            raise ConfigError(f"model_id {self.name} stretches images to squares: set pad2square false")
        processor = sized_processor(spec, image_processor, "use the model's own preprocessor_config.json")
        return FixedSizeImages(processor, self.tokens_per_image(spec), fast_resize=fast_resize)

    def fixed_plan(self, spec: ModelSpec) -> ItemPlan | None:
        return ItemPlan((1, 1, 1), (IMAGE_TOKEN_INDEX,) * self.tokens_per_image(spec))

    def media_of_inputs(self, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
        """pixel_values are [images, 3, image_size, image_size]."""
        refuse_inputs(self.name, inputs, self.inputs)
        return square_images(spec, inputs)

    def inputs_of_media(self, spec: ModelSpec, media: Media) -> dict[str, torch.Tensor]:
        return {"pixel_values": media.pixels}

    def default_image_processor(self, spec: ModelSpec) -> dict[str, Any] | None:
        return part_of(VISION, spec.vision_encoder).image_processor(spec.vision_encoder)


FAMILY = Blip2()
"""The family."""
