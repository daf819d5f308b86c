"""config.json of LLaVA's two public folders, read and written: transformers' and the original code's."""

from __future__ import annotations

import json
from typing import Any

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.config_keys import is_of_llava
from mindspeed_mm.models.part import PartSpec, find_part, part_block, part_of
from mindspeed_mm.weights.layouts import INTERACTION, PROJECTOR, TEXT, VISION

ORIGINAL = "llava"
"""Name of the original code's layout."""

SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's mm_vision_select_feature in HF's words (vision_feature_select_strategy)."""

ORIGINAL_TYPES = {"llama": "llava_llama", "qwen2": "llava_qwen"}
"""model_type of an original folder, by that of its decoder, where it is not `llava_` and that; as it is written."""

DECODER_TYPES = {
    "llava": "llama",
    "llava-post-interaction": "llama",
    **{name: decoder for decoder, name in ORIGINAL_TYPES.items()},
}
"""As it is read; the second one is that of the fork with the post-interaction block."""

LLAVA_DEFAULTS = {
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
}
"""What LLaVA-1.5's released config.json says beside the architecture; a source's own values take their place."""


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is the original code's."""
    return "mm_vision_tower" in config or "mm_projector_type" in config or "mm_hidden_size" in config


def is_tiled(config: dict[str, Any]) -> bool:
    """Whether an original config.json is of LLaVA-1.6, whose images become tiles."""
    merge, aspect = str(config.get("mm_patch_merge_type") or "flat"), str(config.get("image_aspect_ratio") or "square")
    return is_original(config) and (merge != "flat" or "anyres" in aspect or "highres" in aspect)


def has_class_token(encoder: type[PartSpec] | PartSpec) -> bool:
    """Whether a vision encoder (its Spec) puts a class token before the patches."""
    if isinstance(encoder, PartSpec):
        return encoder.class_token_len > 0
    return encoder.model_fields["class_token_len"].default > 0


def select_strategy(encoder: PartSpec) -> str:
    """HF's vision_feature_select_strategy: "default" drops the first feature, whatever it is."""
    return SELECT_STRATEGIES[encoder.select_feature] if has_class_token(encoder) else "full"


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's config inside one of transformers' multimodal configs, with the head's tying as the outer one has
    it. LlavaConfig, alone among them, ties where the inner one says so: transformers 4 wrote it there, beside false."""
    inner = dict(config.get("text_config") or {})
    outer = config.get("tie_word_embeddings")
    if outer or (outer is not None and config.get("model_type", "llava") != "llava"):
        inner["tie_word_embeddings"] = outer
    return inner


def original_text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's config inside an original one, whose top level is the decoder's with LLaVA's keys among it."""
    kind = str(config.get("model_type", "llava"))
    kept = {key: value for key, value in config.items() if not is_of_llava(key)}
    return {**kept, "model_type": DECODER_TYPES.get(kind, kind.removeprefix("llava_"))}


def vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """The vision encoder's config inside a llava-hf config, with the feature selection of the outer one, whose defaults
    are LlavaConfig's."""
    keys = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return {**(config.get("vision_config") or {}), **{key: config.get(key, default) for key, default in keys.items()}}


def vision_select(config: dict[str, Any], class_token: bool = True) -> dict[str, Any]:
    """HF's two vision_feature keys from an original config (mm_vision_select_layer, mm_vision_select_feature). Without
    a class token both of LLaVA's words mean all features.

    Raises WeightError for another word, and for several layers, which the original code does not read.
    """
    feature, layer = config.get("mm_vision_select_feature", "patch"), config.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise WeightError(
            f"config.json: found mm_vision_select_layer {json.dumps(layer)}; expected one layer, such as -2: the "
            "original code takes one. A model of several layers is a folder of transformers' LLaVA (llava-hf)."
        )
    if feature not in SELECT_STRATEGIES:
        raise WeightError(
            f"config.json: found mm_vision_select_feature {feature!r}; expected patch or cls_patch. Correct the file."
        )
    return {
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": SELECT_STRATEGIES[feature] if class_token else "full",
    }


def hf_config(specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """config.json of LlavaForConditionalGeneration, with keys that transformers 4 and 5 read.

    Raises WeightError for a projector that this class does not have.
    """
    text, encoder, projector = (specs[slot] for slot in (TEXT, VISION, PROJECTOR))
    if projector.num_layers != 2 or projector.ffn_hidden_size != projector.hidden_size:
        raise WeightError(
            f"the projector has {projector.num_layers} linears of width {projector.ffn_hidden_size}; expected 2 as "
            "wide as the decoder, which is all that llava-hf can hold. Choose --to llava or mindspeed-mm."
        )
    if projector.image_start_end is not None:
        raise WeightError(
            "the model has <im_start> and <im_end> around each image (mm_use_im_start_end), for which llava-hf has no "
            "key: its processor would leave them out. Choose --to llava or mindspeed-mm."
        )
    inner = {key: value for key, value in tokens.items() if key not in ("image_token_id", "rows")}
    rows = {} if tokens.get("rows") is None else {"vocab_size": tokens["rows"]}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": encoder.num_image_tokens,
        "image_token_index": tokens["image_token_id"],
        "multimodal_projector_bias": projector.add_bias_linear,
        "pad_token_id": tokens.get("pad_token_id"),
        "projector_hidden_act": projector.activation_func,
        "text_config": part_of(TEXT, text).to_hf(text, dtype) | inner | rows,
        "tie_word_embeddings": text.share_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "vision_config": part_of(VISION, encoder).to_hf(encoder, dtype),
        "vision_feature_layer": encoder.select_layer,
        "vision_feature_select_strategy": select_strategy(encoder),
        "vocab_size": text.language_vocab_size,
    }


def original_config(specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """config.json of the original code, without mm_vision_tower, which says where the encoder lies.

    Raises WeightError for what this code does not make: features of several layers, another projector.
    """
    text, vision = specs[TEXT], specs[VISION]
    if isinstance(vision.select_layer, list):
        raise WeightError(
            f"the features are those of the layers {vision.select_layer}; expected one layer, which is all that "
            "mm_vision_select_layer of LLaVA's own code can say. Choose --to llava-hf, llava_next or mindspeed-mm."
        )
    inner = {key: value for key, value in tokens.items() if key not in ("image_token_id", "rows")}
    decoder = part_of(TEXT, text).to_hf(text, dtype)
    kind = ORIGINAL_TYPES.get(decoder["model_type"], f"llava_{decoder['model_type']}")
    architecture = "Qwen" if kind == "llava_qwen" else decoder["architectures"][0].removesuffix("ForCausalLM")
    return {
        **decoder,
        **inner,
        **find_part(PROJECTOR, "mlp").to_hf(specs[PROJECTOR], dtype),
        "architectures": [f"Llava{architecture}ForCausalLM"],
        "model_type": kind,
        "mm_use_im_start_end": specs[PROJECTOR].image_start_end is not None,
        "mm_vision_select_feature": vision.select_feature,
        "mm_vision_select_layer": vision.select_layer,
        "vocab_size": text.language_vocab_size if tokens.get("rows") is None else tokens["rows"],
        **({INTERACTION: part_block(INTERACTION, specs[INTERACTION])} if INTERACTION in specs else {}),
    }
