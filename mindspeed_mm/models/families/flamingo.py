"""Flamingo (Alayrac et al. 2022), as OpenFlamingo and Otter have it: CLIP, a perceiver, and gated cross-attention in
front of every n-th layer of a Llama or an MPT.

An `<image>` is one token of the text; the features of its image stand beside the text. Two public forms: OpenFlamingo's
checkpoint.pt, which holds what was trained alone (perceiver, cross-attention, often the words), and Otter's folder, a
whole model. A folder with a checkpoint.pt has a config.json that names decoder and vision encoder by their paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.media import FramedImages, ItemPlan, MediaProcessor
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.families._flamingo_files import (
    CHANNELS,
    DECODER_LAYERS,
    cross_config,
    named_weights,
    over_base,
    perceiver_config,
    perceiver_sizes,
    with_all_words,
)
from mindspeed_mm.models.families.llava import refuse_inputs, sized_processor
from mindspeed_mm.models.family import Family
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.part import part_of
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION, Layout, Prefix
from mindspeed_mm.weights.sources import PartSource, Source

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec

NAME = "flamingo"

OTTER = "otter"

LAST_LAYER = -1

FRAMES = {
    "model_type": "clip_vision_model",
    "vision_feature_layer": LAST_LAYER,
    "vision_feature_select_strategy": "default",
}
"""What the perceiver sees: the last layer's tokens without the class token, no norm behind them."""

LOOKS_AT = {"select_layer": LAST_LAYER, "select_feature": "patch"}
"""The same in a Spec."""


def _layout(name: str, markers: tuple[str, ...], vision: tuple[Prefix, ...]) -> Layout:
    own = (Prefix("lang_encoder.", TEXT), Prefix("perceiver.", PROJECTOR), *vision)
    prefixes = tuple(Prefix(wrapper + prefix.old, prefix.part) for wrapper in ("", "module.") for prefix in own)
    projector = "flamingo" if name == NAME else "hf"
    return Layout(
        name,
        markers,
        prefixes,
        {TEXT: name, VISION: "hf", PROJECTOR: projector},
        {TEXT: "lang_encoder.", VISION: "vision_encoder.{own}", PROJECTOR: "perceiver."},
    )


OTTER_LAYOUT = _layout(
    OTTER,
    (r"^(module\.)?perceiver\.layers\.0\.norm_media\.", r"^(module\.)?lang_encoder\."),
    (Prefix("vision_encoder.vision_model.", VISION), Prefix("vision_encoder.", VISION)),
)

FLAMINGO_LAYOUT = _layout(
    NAME,
    (r"^(module\.)?perceiver\.layers\.0\.0\.norm_media\.", r"^(module\.)?lang_encoder\."),
    (Prefix("vision_encoder.vision_model.", VISION), Prefix("vision_encoder.", None)),
)
"""open_clip's names of a vision encoder, which is never trained, are not read. Ours is written under transformers'."""


class Flamingo(Family):
    """See the module."""

    name = NAME
    model_types = (OTTER, NAME)
    layouts = (OTTER_LAYOUT, FLAMINGO_LAYOUT)
    model_ids = {PROJECTOR: "perceiver"}
    config_keys = {OTTER: config_keys.FLAMINGO, NAME: config_keys.FLAMINGO}
    template = "otter"
    chats_by_tokenizer = False
    adds_image_token = False
    after_image = ""
    beside_text = True

    # Weights and configs

    def split_config(self, config: dict[str, Any], layout: str) -> dict[str, dict[str, Any] | None]:
        kind = config.get("model_type", NAME)
        if kind not in self.model_types:
            raise ConfigError(
                f'config.json: found model_type "{kind}" with tensors of layout {layout}; expected '
                f"{' or '.join(self.model_types)}. Give weights of a supported model."
            )
        self.check_keys(config, layout)
        text, vision = config.get("text_config"), config.get("vision_config")
        return {
            TEXT: text if isinstance(text, dict) else None,
            VISION: {**vision, **FRAMES} if isinstance(vision, dict) else None,
            PROJECTOR: config,
        }

    def complete(self, source: Source, slots: dict[str, PartSource]) -> dict[str, PartSource]:
        """The decoder under what was trained of it, and the vision encoder, from the folders that config.json names."""
        config = source.config or {}
        slots = dict(slots)
        if TEXT in slots:
            slots[TEXT] = self._decoder(source, slots[TEXT], config)
        named = named_weights(source, config, "vision_encoder_path")
        if VISION not in slots and named is not None:
            found = named.part(VISION)
            slots[VISION] = replace(found, config=found.config and {**found.config, **FRAMES})
        if PROJECTOR in slots and slots[PROJECTOR].config is not None:
            slots[PROJECTOR] = replace(slots[PROJECTOR], config=perceiver_config(slots[PROJECTOR]))
        return slots

    def _decoder(self, source: Source, part: PartSource, config: dict[str, Any]) -> PartSource:
        base = named_weights(source, config, "lang_encoder_path")
        if base is not None:
            part = over_base(part, base.part(TEXT))
        if part.config is None:
            return part
        part = with_all_words(source, part)
        return replace(part, config={**part.config, "cross_attention": cross_config(source, part, config)})

    def missing(self, source: Source, slot: str) -> str | None:
        key = {TEXT: "lang_encoder_path", VISION: "vision_encoder_path"}.get(slot)
        if key is None:
            return None
        return (
            "A checkpoint.pt of OpenFlamingo holds what was trained: put it into a folder with a config.json whose "
            f'{key} is the path of the {slot}, such as {{"model_type": "{NAME}", "lang_encoder_path": "../mpt-1b", '
            '"vision_encoder_path": "../clip-vit-large-patch14"} (docs/flamingo.md).'
        )

    def stated(self, source: Source) -> dict[str, dict[str, Any]]:
        """Sizes of the perceiver, which no config holds, by its tensors; which layer it sees of an encoder without a
        config."""
        stated = {}
        if (encoder := source.part_sources.get(VISION)) is not None and encoder.config is None:
            stated[VISION] = {"select_layer": LAST_LAYER}
        if (part := source.part_sources.get(PROJECTOR)) is not None:
            stated[PROJECTOR] = perceiver_sizes(part)
        return stated

    def join_config(self, layout: str, specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
        text, projector = specs[TEXT], specs[PROJECTOR]
        cross = text.cross_attention
        for name, own in (("text_decoder.cross_attention", cross), ("vision_projector", projector)):
            if own.kv_channels != CHANNELS:
                raise ConfigError(
                    f"{name}.kv_channels: found {own.kv_channels}, expected {CHANNELS}: layout {layout} has no key for "
                    "it. Choose --to mindspeed-mm or checkpoint"
                )
        kept = {key: value for key, value in tokens.items() if key not in ("rows", "image_token_id", "media_token_id")}
        own = {} if projector.max_frames is None else {"max_num_frames": projector.max_frames}
        if layout == OTTER:
            own |= {"architectures": ["OtterForConditionalGeneration"]}
        return {
            "model_type": layout,
            "cross_attn_every_n_layers": cross.every,
            "only_attend_immediate_media": cross.latest_only,
            "media_token_id": cross.media_token_id,
            **own,
            "text_config": part_of(TEXT, text).to_hf(text, dtype) | kept,
            "vision_config": part_of(VISION, specs[VISION]).to_hf(specs[VISION], dtype),
            "tie_word_embeddings": text.share_embeddings_and_output_weights,
            "torch_dtype": dtype,
        }

    def image_token_id(self, config: dict[str, Any]) -> int | None:
        return config.get("media_token_id")

    def token_ids(self, token_to_id: Callable[[str], int | None]) -> dict[str, int]:
        found = token_to_id(IMAGE_TOKEN)
        return {} if found is None else {"media_token_id": found}

    def check_tokens(self, spec: ModelSpec, token_to_id: Callable[[str], int | None]) -> None:
        own, found = spec.text_decoder.cross_attention.media_token_id, token_to_id(IMAGE_TOKEN)
        if found not in (None, own):
            raise ConfigError(
                f"text_decoder.cross_attention.media_token_id: found {own}, expected {found}, the id of {IMAGE_TOKEN} "
                "in the tokenizer. Correct it, or give the tokenizer of the model"
            )

    def check(self, spec: ModelSpec) -> list[str]:
        encoder, projector, decoder = spec.vision_encoder, spec.vision_projector, spec.text_decoder
        problems = []
        if decoder.model_id not in DECODER_LAYERS:
            problems.append(
                f'text_decoder.model_id: found "{decoder.model_id}", a decoder without gated cross-attention; expected '
                f"{' or '.join(DECODER_LAYERS)}"
            )
        elif decoder.cross_attention is None:
            problems.append(
                "text_decoder.cross_attention: found none, expected one with every, memory_size and media_token_id "
                "(and fresh true to begin with a decoder alone)"
            )
        if projector.model_id != self.model_ids[PROJECTOR]:
            problems.append(
                f'image_encoder.vision_projector.model_id: found "{projector.model_id}", expected "perceiver", the '
                f"projector of model_id {NAME}"
            )
        if spec.interaction is not None:
            problems.append(f"interaction: found one; expected none, since model_id {NAME} has cross-attention instead")
        if problems:
            return problems
        found = {key: getattr(encoder, key, None) for key in LOOKS_AT}
        problems += [
            f"image_encoder.vision_encoder.{key}: found {json.dumps(found[key])}, expected {json.dumps(value)}: the "
            "perceiver looks at the patches behind the last layer"
            for key, value in LOOKS_AT.items()
            if found[key] not in (None, value)
        ]
        if projector.input_size != encoder.hidden_size:
            problems.append(
                f"image_encoder.vision_projector.input_size: found {projector.input_size}, expected "
                f"{encoder.hidden_size}, the vision_encoder's hidden_size"
            )
        if decoder.cross_attention.memory_size != projector.hidden_size:
            problems.append(
                f"text_decoder.cross_attention.memory_size: found {decoder.cross_attention.memory_size}, expected "
                f"{projector.hidden_size}, the vision_projector's hidden_size"
            )
        return problems

    # Media

    def media_processor(
        self,
        spec: ModelSpec,
        image_processor: dict[str, Any] | str | Path,
        *,
        pad: bool = False,
        fast_resize: bool = False,
    ) -> MediaProcessor:
        if pad:
            raise ConfigError(f"model_id {self.name} does not pad images to squares: set pad2square false")
        processor = sized_processor(spec, image_processor)
        return FramedImages(processor, 1, max_frames=spec.vision_projector.max_frames, fast_resize=fast_resize)

    def fixed_plan(self, spec: ModelSpec) -> ItemPlan:
        return ItemPlan((1, 1, 1), (IMAGE_TOKEN_INDEX,))

    def media_of_inputs(self, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
        """pixel_values are [images, 3, side, side], or as Otter has them, [rows, images, frames, 3, side, side], with
        equally many images in each row; the frames are those of a video."""
        refuse_inputs(self.name, inputs, ("pixel_values",))
        pixels, side = inputs.get("pixel_values"), spec.vision_encoder.image_size
        if pixels is None:
            return None
        if pixels.dim() not in (4, 6) or tuple(pixels.shape[-3:]) != (3, side, side):
            raise ConfigError(
                f"pixel_values have shape {list(pixels.shape)}; expected [images, 3, {side}, {side}] or [rows, images, "
                f"frames, 3, {side}, {side}]"
            )
        if pixels.dim() == 4:
            return Media.of_images(pixels)
        items, frames = pixels.shape[0] * pixels.shape[1], pixels.shape[2]
        grid = torch.tensor([[frames, 1, 1]]).expand(items, 3).contiguous()
        return Media(pixels.flatten(0, 2), (frames,) * items, grid, torch.zeros(items, 2).long())

    def inputs_of_media(self, spec: ModelSpec, media: Media) -> dict[str, torch.Tensor]:
        return {"pixel_values": media.pixels}

    def default_image_processor(self, spec: ModelSpec) -> dict[str, Any] | None:
        return part_of(VISION, spec.vision_encoder).image_processor(spec.vision_encoder)


FAMILY = Flamingo()
"""The family."""
