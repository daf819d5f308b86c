"""Qwen2.5-VL (Bai et al. 2025): images of any size as patches, a merger, a Qwen2 decoder whose rotary positions have
three axes.

Videos are not taken yet: inputs and data with them are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.media import MediaProcessor
from mindspeed_mm.data.patch_images import PATCH_KEYS, PATCH_TYPES, SIZE, PatchImages
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.families.llava import fit_problems, refuse_inputs
from mindspeed_mm.models.family import Family
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.operations import EncoderWork
from mindspeed_mm.models.part import part_of
from mindspeed_mm.models.vision_projector.patch_merger import TOKEN_KEYS
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION, Layout, Prefix

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec

NAME = "qwen2_5_vl"

TEXT_TYPE = "qwen2_5_vl_text"

MROPE_SECTION = [16, 24, 24]
"""What transformers takes where a config has no mrope_section."""

QWEN2_5_VL = Layout(
    NAME,
    (r"^(model\.)?visual\.merger\.ln_q\.", r"^(model\.)?visual\.blocks\.0\.mlp\.gate_proj\."),
    (
        # Names of the hub, and under `model.` those of the classes since transformers 4.52.
        Prefix("model.", TEXT, "model."),
        Prefix("model.language_model.", TEXT, "model."),
        Prefix("lm_head.", TEXT, "lm_head."),
        *(Prefix(f"{outer}visual.", VISION) for outer in ("", "model.")),
        *(Prefix(f"{outer}visual.merger.", PROJECTOR) for outer in ("", "model.")),
    ),
    {TEXT: "hf", VISION: "hf", PROJECTOR: "hf"},
    {TEXT: "", VISION: "visual.", PROJECTOR: "visual.merger."},
    {TEXT: "model.language_model.", VISION: "model.visual.", PROJECTOR: "model.visual.merger."},
)

TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Tokens of the released tokenizers by HF's config keys."""

INPUTS = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
"""What the processor returns beside ids and mask. The last one says what the ids say, and is not looked at."""


class Qwen25VL(Family):
    """See the module."""

    name = NAME
    model_types = ("qwen2_5_vl",)
    layouts = (QWEN2_5_VL,)
    config_keys = {NAME: config_keys.QWEN2_5_VL}
    model_ids = {VISION: "qwen2_5_vl", PROJECTOR: "patch_merger"}
    template = "qwen"
    after_image = ""
    adds_image_token = False
    multimodal_positions = True

    def split_config(self, config: dict[str, Any], layout: str) -> dict[str, dict[str, Any] | None]:
        """The text part stands inside text_config, or at the top as in the hub's folders."""
        if config.get("model_type", NAME) not in self.model_types:
            raise ConfigError(
                f'config.json: found model_type "{config["model_type"]}" with tensors of layout {layout}; expected '
                f"{' or '.join(self.model_types)}. Give weights of a supported model."
            )
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise ConfigError("config.json: vision_config is missing; copy the whole file of the model.")
        own = ("vision_config", "text_config", "vision_token_id", *TOKEN_KEYS)
        outer = {key: value for key, value in config.items() if key not in own}
        inner = config.get("text_config")
        if inner is not None:
            self.check_keys(config, layout)
        text = dict(outer if inner is None else inner)
        text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        tokens = {key: config[key] for key in TOKEN_KEYS if key in config}
        return {TEXT: _with_sections(text | {"model_type": TEXT_TYPE}), VISION: vision, PROJECTOR: vision | tokens}

    def join_config(self, layout: str, specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
        """As the hub's folders have it, the text part at the top, which transformers of every version reads."""
        text = part_of(TEXT, specs[TEXT]).to_hf(specs[TEXT], dtype)
        vision = part_of(VISION, specs[VISION]).to_hf(specs[VISION], dtype)
        own = {key: tokens.get(key, getattr(specs[PROJECTOR], key)) for key in TOKEN_KEYS}
        kept = {key: value for key, value in tokens.items() if key not in ("rows", *TOKEN_KEYS)}
        return {
            **text,
            **kept,
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": NAME,
            "vision_config": vision | {"out_hidden_size": specs[PROJECTOR].hidden_size},
            **own,
        }

    def token_ids(self, token_to_id: Callable[[str], int | None]) -> dict[str, int]:
        found = {key: token_to_id(token) for key, token in TOKENS.items()}
        return {key: token_id for key, token_id in found.items() if token_id is not None}

    def check(self, spec: ModelSpec) -> list[str]:
        encoder, projector, decoder = spec.vision_encoder, spec.vision_projector, spec.text_decoder
        if problems := self.other_parts(spec):
            return problems
        problems = fit_problems(spec)
        if encoder.spatial_merge_size != projector.spatial_merge_size:
            problems.append(
                f"image_encoder.vision_projector.spatial_merge_size: found {projector.spatial_merge_size}, expected "
                f"{encoder.spatial_merge_size}, the vision_encoder's"
            )
        if decoder.traits.mrope_section is None:
            problems.append(
                "text_decoder.mrope_section: found none, expected the pairs of channels that turn by time, height and "
                f"width, such as {MROPE_SECTION}; a decoder of model_id qwen2 has the key"
            )
        wrong = [key for key in TOKEN_KEYS[2:] if getattr(projector, key) >= decoder.language_vocab_size]
        problems += [
            f"image_encoder.vision_projector.{key}: found {getattr(projector, key)}, expected a token of the "
            f"text_decoder, whose language_vocab_size is {decoder.language_vocab_size}"
            for key in wrong
        ]
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
            raise ConfigError(f"model_id {self.name} pads no image to a square: set pad2square false")
        encoder, projector = spec.vision_encoder, spec.vision_projector
        return PatchImages(
            image_processor,
            patch=encoder.patch_size,
            frames=encoder.temporal_patch_size,
            merge=encoder.spatial_merge_size,
            tags=(projector.vision_start_token_id, projector.vision_end_token_id),
            fast_resize=fast_resize,
        )

    def media_of_inputs(self, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
        """pixel_values are [patches, values of a patch], image_grid_thw [I, 3]."""
        refuse_inputs(self.name, inputs, INPUTS)
        pixels, grid, encoder = inputs.get("pixel_values"), inputs.get("image_grid_thw"), spec.vision_encoder
        if pixels is None and grid is None:
            return None
        if pixels is None or grid is None:
            raise ConfigError(f"model_id {self.name} takes pixel_values and image_grid_thw together; found one of them")
        grid, merge = grid.cpu().long(), encoder.spatial_merge_size
        if grid.dim() != 2 or grid.shape[1] != 3 or grid.min() < 1 or (grid[:, 1:] % merge).any():
            raise ConfigError(
                f"image_grid_thw is {grid.tolist()}; expected [images, 3] positive numbers (time, height, width in "
                f"patches), the last two multiples of spatial_merge_size {merge}"
            )
        rows = tuple(grid.prod(1).tolist())
        if tuple(pixels.shape) != (sum(rows), encoder.patch_channels):
            raise ConfigError(
                f"pixel_values have shape {list(pixels.shape)}; expected [{sum(rows)}, {encoder.patch_channels}], the "
                "patches that image_grid_thw says"
            )
        return Media(pixels, rows, grid, torch.zeros(len(rows), 2, dtype=torch.int64))

    def inputs_of_media(self, spec: ModelSpec, media: Media) -> dict[str, torch.Tensor]:
        return {"pixel_values": media.pixels, "image_grid_thw": media.grid}

    def planned_image(self, spec: ModelSpec) -> EncoderWork:
        """A square image of 448 pixels, or what whole squares of patches make of them."""
        work = spec.vision_encoder.encoder_work(0, [spec.vision_encoder.planned_grid])
        return replace(work, tokens=work.features)

    def default_image_processor(self, spec: ModelSpec) -> dict[str, Any] | None:
        """transformers' defaults, with the encoder's patches."""
        encoder = spec.vision_encoder
        sizes = (encoder.patch_size, encoder.temporal_patch_size, encoder.spatial_merge_size)
        return {"image_processor_type": PATCH_TYPES[0], "size": SIZE, **dict(zip(PATCH_KEYS, sizes, strict=True))}

    # Positions

    def item_counts(self, spec: ModelSpec, media: Media) -> list[int]:
        square = spec.vision_projector.spatial_merge_size**2
        return [rows // square for rows in media.rows]

    def positions(self, spec: ModelSpec, input_ids: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Text counts up on all axes. The features of an image stand at its own time, rows and columns behind the text
        before it, and what follows goes on behind the longer side (transformers' get_rope_index).

        Raises DataError where the placeholders are not those of the items.
        """
        merge = spec.vision_projector.spatial_merge_size
        is_image = (input_ids == IMAGE_TOKEN_INDEX).tolist()
        pieces: list[torch.Tensor] = []
        place = start = 0
        following = iter(grids.tolist())
        while place < len(is_image):
            if is_image[place]:
                time, rows, columns = next(following, (0, 0, 0))
                own = _grid_positions(time, rows // merge, columns // merge) + start
                length, step = own.shape[1], max(rows, columns) // merge
                if not length or not all(is_image[place : place + length]) or place + length > len(is_image):
                    raise DataError(
                        f"{sum(is_image)} image positions are not those of images with the grids {grids.tolist()}: "
                        "expand each image by its own number"
                    )
            else:
                length = next((n for n, found in enumerate(is_image[place:]) if found), len(is_image) - place)
                own, step = (torch.arange(length) + start).expand(3, -1), length
            pieces.append(own)
            place, start = place + length, start + step
        if next(following, None) is not None:
            raise DataError(f"there are fewer image positions than images with the grids {grids.tolist()}")
        return torch.cat(pieces, dim=1) if pieces else torch.empty(3, 0, dtype=torch.int64)


def _grid_positions(time: int, rows: int, columns: int) -> torch.Tensor:
    """[3, time * rows * columns]: the time, row and column of each feature."""
    return torch.cartesian_prod(torch.arange(time), torch.arange(rows), torch.arange(columns)).view(-1, 3).t()


def _with_sections(text: dict[str, Any]) -> dict[str, Any]:
    """A text config whose rotary embedding has sections, transformers' own where it names none."""
    for key in ("rope_parameters", "rope_scaling"):
        if (text.get(key) or {}).get("mrope_section"):
            return text
    key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    return {**text, key: {**(text.get(key) or {"rope_type": "default"}), "mrope_section": MROPE_SECTION}}


FAMILY = Qwen25VL()
"""The family."""
