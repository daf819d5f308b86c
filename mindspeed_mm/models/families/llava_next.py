"""LLaVA-NeXT, also called LLaVA-1.6 (Liu et al. 2024): LLaVA whose images of any size become tiles.

Two public folders: transformers' LlavaNextForConditionalGeneration (llava_next) and the original code's (llava), whose
config.json says image_aspect_ratio anyres. Its releases have mm_patch_merge_type spatial_unpad; the code also trains
spatial and flat, which have no newline vector and no place in transformers' class.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.data.image_tiles import TiledImages
from mindspeed_mm.data.media import ItemPlan, MediaProcessor
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.families.llava import (
    DECODER_PREFIXES,
    LLAVA,
    MODULES,
    TOKEN_TYPES,
    VISION_PREFIXES,
    Llava,
    nested,
    refuse_inputs,
    two_kinds,
)
from mindspeed_mm.models.llava_config import ORIGINAL, is_tiled
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.operations import EncoderWork
from mindspeed_mm.models.tiles import UNPAD, tile_features, tile_grid
from mindspeed_mm.models.vision_projector.llava_next import pinpoints_of
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION, Layout, Prefix

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec
    from mindspeed_mm.weights.sources import PartSource, Source

HF = "llava_next"

MERGES = (UNPAD, "spatial", "flat")
"""Values of the original code's mm_patch_merge_type."""

LLAVA_NEXT_HF = Layout(
    HF,
    (r"^(model\.)?multi_modal_projector\.", r"^(model\.)?image_newline$"),
    (
        *DECODER_PREFIXES,
        *VISION_PREFIXES,
        *nested("multi_modal_projector.", PROJECTOR, "multi_modal_projector."),
        *nested("image_newline", PROJECTOR, "image_newline"),
    ),
    {TEXT: "hf", VISION: "hf", PROJECTOR: "hf"},
    # Names of the hub, which transformers of every version reads.
    {TEXT: "language_model.", VISION: "vision_tower.{own}", PROJECTOR: ""},
    MODULES,
)

LLAVA_NEXT = Layout(
    ORIGINAL,
    (*LLAVA.markers, r"^model\.image_newline$"),
    (
        *(prefix for prefix in LLAVA.prefixes if prefix.part != PROJECTOR),
        Prefix("model.mm_projector.", PROJECTOR, "mm_projector."),
        *(Prefix(f"model.mm_projector.{name}", PROJECTOR, f"mm_projector.0.{name}") for name in ("weight", "bias")),
        Prefix("model.image_newline", PROJECTOR, "image_newline"),
    ),
    LLAVA.dialects,
    {**LLAVA.written, PROJECTOR: "model."},
)

LLAVA_TILES = replace(LLAVA_NEXT, markers=LLAVA.markers, written={})
"""The same without a newline vector (mm_patch_merge_type flat and spatial); LLAVA_NEXT writes both."""


class LlavaNext(Llava):
    """See the module."""

    name = "llava_next"
    model_types = ("llava_next",)
    layouts = (LLAVA_NEXT_HF, LLAVA_NEXT, LLAVA_TILES)
    config_keys = {HF: config_keys.LLAVA_NEXT_HF, ORIGINAL: config_keys.ORIGINAL}
    model_ids = {PROJECTOR: "llava_next"}
    processor_class = "LlavaNextProcessor"

    def reads(self, config: dict[str, Any]) -> bool:
        return config.get("model_type") in self.model_types or is_tiled(config)

    def split_config(self, config: dict[str, Any], layout: str) -> dict[str, dict[str, Any] | None]:
        split = super().split_config(config, layout)
        if layout == ORIGINAL and split[PROJECTOR] is not None:
            _check_original(config)
            grids = {"image_grid_pinpoints": pinpoints_of(config, width_first=True)}
            grids["mm_patch_merge_type"] = config.get("mm_patch_merge_type") or "flat"
            return {**split, PROJECTOR: {**split[PROJECTOR], **grids}}
        return split

    def complete(self, source: Source, slots: dict[str, PartSource]) -> dict[str, PartSource]:
        """Weights and config.json agree on the newline vector."""
        if source.layout == ORIGINAL and PROJECTOR in slots:
            merge = (source.config or {}).get("mm_patch_merge_type") or "flat"
            if (merge == UNPAD) != ("image_newline" in slots[PROJECTOR].names):
                raise two_kinds(source.config or {})
        return super().complete(source, slots)

    def pads(self, config: dict[str, Any]) -> bool:
        return False

    def join_config(self, layout: str, specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
        config = super().join_config(layout, specs, dtype, tokens)
        projector = specs[PROJECTOR]
        if layout == HF:
            if projector.mm_patch_merge_type != UNPAD:
                raise WeightError(
                    f'mm_patch_merge_type is "{projector.mm_patch_merge_type}"; transformers knows spatial_unpad '
                    "alone. Choose --to llava or --to mindspeed-mm."
                )
            grids = [list(pair) for pair in projector.image_grid_pinpoints]
            own = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
            return config | own | {"image_grid_pinpoints": grids}
        if projector.num_layers == 1:
            raise WeightError(
                "the projector has one linear; expected two or more, as every LLaVA-1.6 has. Choose --to mindspeed-mm."
            )
        return config | {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [list(reversed(pair)) for pair in projector.image_grid_pinpoints],
            "mm_patch_merge_type": projector.mm_patch_merge_type,
        }

    def check(self, spec: ModelSpec) -> list[str]:
        problems = super().check(spec)
        encoder, projector = spec.vision_encoder, spec.vision_projector
        if projector.model_id != self.model_ids[PROJECTOR]:
            return problems
        side = encoder.image_size
        wrong = [list(pair) for pair in projector.image_grid_pinpoints if pair[0] % side or pair[1] % side]
        if wrong:
            problems.append(
                f"image_encoder.vision_projector.image_grid_pinpoints: found {', '.join(map(str, wrong))}, expected "
                f"multiples of the vision_encoder's image_size {side}, the side of a tile"
            )
        if encoder.num_image_tokens != _patches(spec) ** 2:
            problems.append(
                f'image_encoder.vision_encoder.select_feature: found "{encoder.select_feature}", expected "patch": '
                "features of tiles are put together as grids, where a class token has no place"
            )
        most = max(
            tile_features(pair, (pair[0] // side, pair[1] // side), _patches(spec), projector.mm_patch_merge_type)
            for pair in projector.image_grid_pinpoints
        )
        limit = spec.text_decoder.language_max_sequence_length
        if not wrong and encoder.num_image_tokens < limit <= most:
            problems.append(
                f"text_decoder.language_max_sequence_length: found {limit}, expected more than {most}, the tokens of "
                "an image of the largest of image_grid_pinpoints"
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
            raise ConfigError(
                "model_id llava_next cuts images into tiles and pads none to a square: set pad2square false"
            )
        return TiledImages(
            image_processor,
            spec.vision_projector.image_grid_pinpoints,
            side=spec.vision_encoder.image_size,
            patches=_patches(spec),
            merge=spec.vision_projector.mm_patch_merge_type,
            fast_resize=fast_resize,
        )

    def fixed_plan(self, spec: ModelSpec) -> ItemPlan | None:
        return None

    def planned_image(self, spec: ModelSpec) -> EncoderWork:
        """An image that fills the largest of the pinpoints."""
        side = spec.vision_encoder.image_size
        size = max(spec.vision_projector.image_grid_pinpoints, key=lambda size: (math.prod(size), size))
        grid = (size[0] // side, size[1] // side)
        work = spec.vision_encoder.encoder_work(1 + math.prod(grid), [(1, *grid)])
        merge = spec.vision_projector.mm_patch_merge_type
        return replace(work, tokens=tile_features(tuple(size), grid, _patches(spec), merge))

    def media_of_inputs(self, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
        """pixel_values are [I, T, 3, h, w], filled up to the most tiles, or the tiles of all images [T, 3, h, w]."""
        refuse_inputs(self.name, inputs, ("pixel_values", "image_sizes", TOKEN_TYPES))
        pixels, sizes, side = inputs.get("pixel_values"), inputs.get("image_sizes"), spec.vision_encoder.image_size
        if pixels is None and sizes is None:
            return None
        if pixels is None or sizes is None:
            raise ConfigError("model_id llava_next takes pixel_values and image_sizes together; found one of them")
        sizes = sizes.cpu().long()
        pinpoints = spec.vision_projector.image_grid_pinpoints
        grids = [tile_grid(tuple(size), pinpoints, side) for size in sizes.tolist()]
        rows = tuple(1 + height * width for height, width in grids)
        stacked = pixels.dim() == 5 and len(pixels) == len(rows) and pixels.shape[1] >= max(rows)
        if stacked:
            pixels = torch.cat([own[:count] for own, count in zip(pixels, rows, strict=True)])
        if tuple(pixels.shape[1:]) != (3, side, side) or pixels.shape[0] != sum(rows):
            raise ConfigError(
                f"pixel_values have shape {list(inputs['pixel_values'].shape)}; expected [images, tiles, 3, {side}, "
                f"{side}] with {', '.join(map(str, rows))} tiles, as image_sizes and image_grid_pinpoints say"
            )
        return Media(pixels, rows, torch.tensor([(1, *grid) for grid in grids]), sizes)

    def inputs_of_media(self, spec: ModelSpec, media: Media) -> dict[str, torch.Tensor]:
        images = media.pixels.split(media.rows)
        stacked = media.pixels.new_zeros(len(images), max(media.rows), *media.pixels.shape[1:])
        for place, own in zip(stacked, images, strict=True):
            place[: len(own)] = own
        return {"pixel_values": stacked, "image_sizes": media.sizes}

    def default_image_processor(self, spec: ModelSpec) -> dict[str, Any] | None:
        return self.fit_image_processor(spec, super().default_image_processor(spec))

    def fit_image_processor(self, spec: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
        """The encoder's own processor, as original folders have it, becomes the one that makes tiles."""
        return self.media_processor(spec, config).config


def _patches(spec: ModelSpec) -> int:
    """Features in a line of a tile."""
    return spec.vision_encoder.image_size // spec.vision_encoder.patch_size


def _check_original(config: dict[str, Any]) -> None:
    """Raise ConfigError for another way of tiling than LLaVA-1.6's."""
    if config.get("mm_use_im_start_end"):
        raise ConfigError(
            "config.json: found mm_use_im_start_end true with tiles of LLaVA-1.6, whose released models have no tokens "
            "around an image; expected false. Give another checkpoint."
        )
    merge, aspect = config.get("mm_patch_merge_type") or "flat", config.get("image_aspect_ratio") or "square"
    if aspect != "anyres" or merge not in MERGES:
        raise ConfigError(
            f"config.json: found image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r}; expected anyres "
            f"with {', '.join(MERGES)}. Other ways give other sequences of features, which do not exist here."
        )


FAMILY = LlavaNext()
"""The family."""
