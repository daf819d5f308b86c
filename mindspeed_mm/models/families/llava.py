"""LLaVA and LLaVA-1.5 (Liu et al. 2023): an encoder of one fixed image size, an MLP, any decoder.

Two public folders: transformers' LlavaForConditionalGeneration (llava-hf) and the original code's (llava), whose
config.json is the decoder's with mm_* keys, and which names its vision encoder by a path of its own.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.media import FixedSizeImages, ItemPlan, MediaProcessor, tagged
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.describe import part_of_source
from mindspeed_mm.models.family import Family
from mindspeed_mm.models.interaction.post_block import BLOCK_ONLY
from mindspeed_mm.models.llava_config import (
    ORIGINAL,
    has_class_token,
    hf_config,
    is_original,
    is_tiled,
    original_config,
    original_text_config,
    select_strategy,
    text_config,
    vision_config,
    vision_select,
)
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.part import all_parts, part_of
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.vision_projector.mlp import projector_prefixes
from mindspeed_mm.weights.layouts import INTERACTION, PROJECTOR, TEXT, VISION, Layout, Prefix
from mindspeed_mm.weights.sources import PartSource, Source

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec

logger = logging.getLogger(__name__)

HF = "llava-hf"

START_END_TOKENS = ("<im_start>", "<im_end>")
"""What LLaVA v1.0 puts before and behind each image."""

TOKEN_TYPES = "mm_token_type_ids"
"""What processors return where they are asked for it: 1 at an image's tokens. The ids say the same."""

IMAGE_TOKEN_ID = 32000
"""LlavaConfig's default of image_token_index."""


def nested(outer: str, slot: str, new: str = "") -> tuple[Prefix, Prefix]:
    """A module with the prefix of transformers before 4.52 and, under `model.`, of the classes since."""
    return Prefix(outer, slot, new), Prefix("model." + outer, slot, new)


DECODER_PREFIXES = (
    Prefix("language_model.", TEXT),
    Prefix("model.language_model.", TEXT, "model."),
    Prefix("lm_head.", TEXT, "lm_head."),
)
"""A decoder inside one of transformers' multimodal models, before and since 4.52."""

VISION_PREFIXES = (*nested("vision_tower.vision_model.", VISION), *nested("vision_tower.", VISION))

MODULES = {TEXT: "model.language_model.", VISION: "model.vision_tower.", PROJECTOR: "model.multi_modal_projector."}

LLAVA_HF = Layout(
    HF,
    (r"^(model\.)?multi_modal_projector\.",),
    (*DECODER_PREFIXES, *VISION_PREFIXES, *nested("multi_modal_projector.", PROJECTOR)),
    {TEXT: "hf", VISION: "hf", PROJECTOR: "hf"},
    # Names of the hub, which transformers of every version reads.
    {TEXT: "language_model.", VISION: "vision_tower.{own}", PROJECTOR: "multi_modal_projector."},
    MODULES,
)

LLAVA = Layout(
    ORIGINAL,
    (r"(^|\.)mm_projector\.", r"^model\.(layers\.|embed_tokens\.|tok_embeddings\.)"),
    (
        Prefix("", TEXT),
        Prefix("model.vision_tower.vision_tower.vision_model.", VISION),
        Prefix("model.vision_tower.vision_tower.", VISION),
        *projector_prefixes("model.mm_projector."),
        *BLOCK_ONLY.prefixes,
    ),
    {TEXT: "hf", VISION: "hf", PROJECTOR: "llava", INTERACTION: "llava"},
    {
        TEXT: "",
        VISION: "model.vision_tower.vision_tower.{own}",
        PROJECTOR: "model.mm_projector.",
        INTERACTION: BLOCK_ONLY.written[INTERACTION],
    },
)


class Llava(Family):
    """See the module."""

    name = "llava"
    model_types = ("llava",)
    layouts = (LLAVA_HF, LLAVA)
    config_keys = {HF: config_keys.LLAVA_HF, ORIGINAL: config_keys.ORIGINAL}
    model_ids = {PROJECTOR: "mlp"}
    processor_class = "LlavaProcessor"

    def reads(self, config: dict[str, Any]) -> bool:
        return (super().reads(config) or is_original(config)) and not is_tiled(config)

    def split_config(self, config: dict[str, Any], layout: str) -> dict[str, dict[str, Any] | None]:
        self._check_config(config, layout)
        if layout == ORIGINAL:
            decoder = original_text_config(config)
            return {
                TEXT: decoder,
                VISION: None,
                PROJECTOR: config if "mm_hidden_size" in config else None,
                INTERACTION: config,
            }
        return {TEXT: text_config(config), VISION: vision_config(config), PROJECTOR: config}

    def _check_config(self, config: dict[str, Any], layout: str) -> None:
        """Raise ConfigError where a config.json asks for what is not done here."""
        if layout == ORIGINAL:
            if is_tiled(config) != (self.name != "llava"):
                raise two_kinds(config)
            self.check_keys(config_keys.own_part(config), layout)
            _check_aspect(config)
            return
        if config.get("model_type", self.name) not in self.model_types:
            raise ConfigError(
                f'config.json: found model_type "{config["model_type"]}" with tensors of layout {layout}; expected '
                f"{' or '.join(self.model_types)}. Give all tensors of the model that config.json describes, if "
                "some are missing, or weights of a supported model."
            )
        self.check_keys(config, layout)

    def complete(self, source: Source, slots: dict[str, PartSource]) -> dict[str, PartSource]:
        """An original folder names its vision encoder by path, relative to the folder; tensors inside come first."""
        if source.layout != ORIGINAL:
            return slots
        config = source.config or {}
        if not is_tiled(config) and any(name.endswith("image_newline") for name in slots[TEXT].names):
            raise two_kinds(config)
        vision_select(config)  # also where no encoder is named
        named = _named_encoder(source.path, config)
        described = named.config if named else None
        if described is not None and named.dialect == "hf":
            described = {**described, **vision_select(config, has_class_token(part_of_source(named).Spec))}
        if VISION in slots:
            hf = described if named and named.dialect == "hf" else None
            return {**slots, VISION: replace(slots[VISION], config=hf, model_id=_encoder_of(slots[VISION].names))}
        return {**slots, VISION: replace(named, config=described)} if named else slots

    def stated(self, source: Source) -> dict[str, dict[str, Any]]:
        if source.layout != ORIGINAL:
            return {}
        config = source.config or {}
        self._check_named_encoder(source, config)
        layer = vision_select(config)["vision_feature_layer"]
        return {
            VISION: {"select_layer": layer, "select_feature": config.get("mm_vision_select_feature", "patch")},
            PROJECTOR: {"image_start_end": _start_end_tokens(config, source.path)},
        }

    @staticmethod
    def _check_named_encoder(source: Source, config: dict[str, Any]) -> None:
        """Raise WeightError where the config of a vision encoder should lie in a folder that is not there."""
        name = config.get("mm_vision_tower")
        if VISION not in source.part_sources or source.part(VISION).config is not None:
            return
        if str(name).startswith((".", "/")):
            raise WeightError(
                f"{source.path}: the config of the vision encoder {name!r} is not there; put the encoder's folder at "
                "that path (relative to this folder)"
            )
        if part_of_source(source.part(VISION)).from_shapes is None:
            raise WeightError(
                f"{source.path}: no config of the vision encoder {name!r} is here, and shapes do not show all of it; "
                "put its folder (config.json suffices) beside and the path into mm_vision_tower of config.json"
            )
        # A name of the hub, whose encoders are CLIP releases: shapes show all but the heads.
        logger.info(
            "%s: no config of the vision encoder %r is here; its heads are taken as its width / 64", source.path, name
        )

    def pads(self, config: dict[str, Any]) -> bool:
        return config.get("image_aspect_ratio", "square") == "pad" if is_original(config) else True

    def missing(self, source: Source, slot: str) -> str | None:
        name = (source.config or {}).get("mm_vision_tower")
        if slot != VISION or not name:
            return None
        return (
            f"Its config names the vision encoder {name!r}, which is not a path here. Put the path of the encoder's "
            "folder or file into mm_vision_tower of config.json; or join the parts, by ckpt_path in a model.json or by "
            f"`mindspeed-mm convert --text-decoder {source.path} --projector {source.path} --vision-encoder ENCODER`."
        )

    def join_config(self, layout: str, specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
        return (original_config if layout == ORIGINAL else hf_config)(specs, dtype, tokens)

    def processor_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Of transformers' processor; it counts the class token and drops it for "default"."""
        encoder = spec.vision_encoder
        return {
            "processor_class": self.processor_class,
            "image_token": "<image>",
            "num_additional_image_tokens": encoder.class_token_len,
            "patch_size": encoder.patch_size,
            "vision_feature_select_strategy": select_strategy(encoder),
        }

    def image_token_id(self, config: dict[str, Any]) -> int | None:
        if is_original(config):
            return None
        found = super().image_token_id(config)
        return IMAGE_TOKEN_ID if found is None else found

    def check(self, spec: ModelSpec) -> list[str]:
        encoder, projector, decoder = spec.vision_encoder, spec.vision_projector, spec.text_decoder
        problems = fit_problems(spec)
        if encoder.num_image_tokens >= decoder.language_max_sequence_length:
            problems.append(
                f"text_decoder.language_max_sequence_length: found {decoder.language_max_sequence_length}, expected "
                f"more than the {encoder.num_image_tokens} tokens of one image"
            )
        if projector.model_id != self.model_ids[PROJECTOR]:
            problems.append(
                f'image_encoder.vision_projector.model_id: found "{projector.model_id}", expected '
                f'"{self.model_ids[PROJECTOR]}", the projector of model_id {self.name}'
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
        processor = sized_processor(spec, image_processor)
        return FixedSizeImages(
            processor,
            spec.vision_encoder.num_image_tokens,
            tags=spec.vision_projector.image_start_end,
            pad=pad,
            fast_resize=fast_resize,
        )

    def fixed_plan(self, spec: ModelSpec) -> ItemPlan | None:
        return ItemPlan((1, 1, 1), tagged(spec.vision_encoder.num_image_tokens, spec.vision_projector.image_start_end))

    def media_of_inputs(self, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
        refuse_inputs(self.name, inputs, ("pixel_values", TOKEN_TYPES))
        return square_images(spec, inputs)

    def inputs_of_media(self, spec: ModelSpec, media: Media) -> dict[str, torch.Tensor]:
        return {"pixel_values": media.pixels}

    def default_image_processor(self, spec: ModelSpec) -> dict[str, Any] | None:
        return part_of(VISION, spec.vision_encoder).image_processor(spec.vision_encoder)


def _start_end_tokens(config: dict[str, Any], folder: Path) -> list[int] | None:
    """Ids of <im_start> and <im_end>, which LLaVA v1.0 has around the features of an image (mm_use_im_start_end of an
    original config.json); None where nothing stands around them.

    Raises ConfigError where the tokenizer of `folder` does not know them.
    """
    if not config.get("mm_use_im_start_end"):
        return None
    from mindspeed_mm.data.tokenizer import load_tokenizer

    words = load_tokenizer(folder)
    ids = {token: words.token_to_id(token) for token in START_END_TOKENS}
    missing = [token for token, token_id in ids.items() if token_id is None]
    if missing:
        raise ConfigError(
            f"{folder / 'config.json'}: found mm_use_im_start_end true, and no {' and no '.join(missing)} in the "
            "vocabulary of the tokenizer beside it; expected both. Copy the tokenizer files of this model into the "
            "folder (added_tokens.json and tokenizer_config.json among them)."
        )
    return list(ids.values())


def _check_aspect(config: dict[str, Any]) -> None:
    """Raise ConfigError for a way of preparing images that is not done here."""
    aspect = config.get("image_aspect_ratio")
    if not is_tiled(config) and aspect not in ("pad", "square", None):
        raise ConfigError(
            f"config.json: found image_aspect_ratio {aspect!r}; expected pad or square, or anyres with "
            "an mm_patch_merge_type. Use weights of a supported model."
        )


def two_kinds(config: dict[str, Any]) -> ConfigError:
    """A config.json that asks for tiles, or for a newline vector, beside weights of another kind, or the reverse."""
    return ConfigError(
        "config.json and weights are of two kinds of LLaVA: tiles go with image_aspect_ratio anyres, and a tensor "
        "model.image_newline with mm_patch_merge_type spatial_unpad alone; config.json says "
        f"{config.get('image_aspect_ratio')!r} and {config.get('mm_patch_merge_type')!r}. Correct it or give the "
        "weights that belong to it."
    )


def fit_problems(spec: ModelSpec) -> list[str]:
    """Widths of encoder, projector and decoder that do not meet."""
    encoder, projector = spec.vision_encoder, spec.vision_projector
    problems = []
    if projector.input_size != encoder.feature_size:
        layers = encoder.feature_size // encoder.hidden_size
        several = "" if layers == 1 else f" times the {layers} layers of its select_layer"
        problems.append(
            f"image_encoder.vision_projector.input_size: found {projector.input_size}, expected "
            f"{encoder.feature_size}, the vision_encoder's hidden_size{several}"
        )
    if projector.hidden_size != spec.text_decoder.hidden_size:
        problems.append(
            f"image_encoder.vision_projector.hidden_size: found {projector.hidden_size}, expected "
            f"{spec.text_decoder.hidden_size}, the text_decoder's hidden_size"
        )
    return problems


def sized_processor(
    spec: ModelSpec,
    source: dict[str, Any] | str | Path,
    cure: str = "use the preprocessor_config.json of the vision encoder",
) -> ImageProcessor:
    """The image processor of a config. Raises ConfigError, with what to do, where its images have another size than the
    vision encoder takes."""
    processor, side = ImageProcessor.from_config(source), spec.vision_encoder.image_size
    if processor.output_size not in (None, (side, side)):
        height, width = processor.output_size
        raise ConfigError(
            f"the image processor gives {width} x {height} pixels, the vision encoder takes {side} x {side} "
            f"(image_encoder.vision_encoder.image_size): {cure}"
        )
    return processor


def square_images(spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> Media | None:
    """pixel_values [images, 3, image_size, image_size] as media; None where there are none. Raises ConfigError for
    another shape."""
    pixels, side = inputs.get("pixel_values"), spec.vision_encoder.image_size
    if pixels is None:
        return None
    if tuple(pixels.shape[1:]) != (3, side, side):
        raise ConfigError(f"pixel_values have shape {list(pixels.shape)}; expected [images, 3, {side}, {side}]")
    return Media.of_images(pixels)


def refuse_inputs(family: str, inputs: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise ConfigError for inputs that the family does not know."""
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        raise ConfigError(f"model_id {family} takes the inputs {', '.join(known)}; found {', '.join(unknown)}")


def _named_encoder(folder: Path, config: dict[str, Any]) -> PartSource | None:
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        return None
    path = folder / name  # an absolute name replaces the folder
    return open_source(path, follow=False).part(VISION) if path.exists() else None


def _encoder_of(names: tuple[str, ...]) -> str | None:
    """model_id of the vision encoder that has tensors of such names; None for the default one."""
    for part in all_parts(VISION).values():
        if any(layout.dialects[VISION] == "hf" and layout.recognises(names) for layout in part.layouts):
            return part.name
    return None


FAMILY = Llava()
