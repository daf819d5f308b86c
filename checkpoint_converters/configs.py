"""config.json and processor files of the layouts that are written."""

from pathlib import Path
from typing import Any

from checkpoint_converters.companions import ImageVocabulary
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.part import PartSpec
from mindspeed_mm.models.spec import part_of
from mindspeed_mm.weights.configs import SELECT_STRATEGIES
from mindspeed_mm.weights.sources import Source

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

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


def hf_config(kind: str, spec: PartSpec, dtype: str) -> dict[str, Any]:
    """config.json of one part as stock transformers reads it."""
    return part_of(kind, spec).to_hf(spec, dtype)


def text_tokens(source: Source) -> dict[str, Any]:
    """Ids of the special tokens, where the source's config has them."""
    part = source.part_sources.get("text_decoder")
    config = (part.config if part else None) or {}
    return {key: config[key] for key in TOKEN_KEYS if isinstance(config.get(key), int | list)}


def llava_hf_config(
    specs: dict[str, PartSpec], dtype: str, vocabulary: ImageVocabulary, tokens: dict[str, Any]
) -> dict[str, Any]:
    """config.json of LlavaForConditionalGeneration, with keys that transformers 4 and 5 read.

    Raises WeightError for a projector that this class does not have.
    """
    text, vision_encoder, projector = (specs[kind] for kind in ("text_decoder", "vision_encoder", "vision_projector"))
    if projector.num_layers != 2 or projector.ffn_hidden_size != projector.hidden_size:
        raise WeightError(
            f"the projector has {projector.num_layers} linears of width {projector.ffn_hidden_size}; expected 2 as "
            "wide as the decoder, which is all that llava-hf can hold. Choose --to llava or mindspeed-mm."
        )
    text_config = hf_config("text_decoder", text, dtype) | tokens
    strategies = {feature: strategy for feature, strategy in SELECT_STRATEGIES.items()}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": vision_encoder.num_image_tokens,
        "image_token_index": vocabulary.image_id,
        "multimodal_projector_bias": True,
        "pad_token_id": vocabulary.pad_id,
        "projector_hidden_act": projector.activation_func,
        "text_config": text_config | {"pad_token_id": vocabulary.pad_id, "vocab_size": vocabulary.rows},
        "tie_word_embeddings": text.share_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "vision_config": hf_config("vision_encoder", vision_encoder, dtype),
        "vision_feature_layer": vision_encoder.select_layer,
        "vision_feature_select_strategy": strategies[vision_encoder.select_feature],
        "vocab_size": text.language_vocab_size,
    }


def processor_config(spec: PartSpec) -> dict[str, Any]:
    """processor_config.json of transformers' LlavaProcessor; it counts the class token and drops it for "default"."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": spec.class_token_len,
        "patch_size": spec.patch_size,
        "vision_feature_select_strategy": SELECT_STRATEGIES[spec.select_feature],
    }


def image_processor_config(spec: PartSpec) -> dict[str, Any]:
    """preprocessor_config.json of a vision encoder whose source has none: that of every CLIP release, at the vision
    encoder's size."""
    size = spec.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def projector_type(spec: PartSpec) -> str:
    """LLaVA's mm_projector_type."""
    return "linear" if spec.num_layers == 1 else f"mlp{spec.num_layers}x_gelu"


def projector_config(spec: PartSpec) -> dict[str, Any]:
    """The keys of a liuhaotian config.json that describe the projector."""
    if spec.num_layers > 1 and spec.ffn_hidden_size != spec.hidden_size:
        raise WeightError(
            f"the projector is {spec.ffn_hidden_size} wide inside; expected {spec.hidden_size}, since LLaVA has no key "
            "for another width. Choose --to mindspeed-mm."
        )
    return {
        "hidden_size": spec.hidden_size,
        "mm_hidden_size": spec.input_size,
        "mm_projector_type": projector_type(spec),
    }


def llava_config(
    specs: dict[str, PartSpec], dtype: str, source: Source, vision_encoder: str, tokens: dict[str, Any], rows: int
) -> dict[str, Any]:
    """config.json of the liuhaotian layout; `vision_encoder` is its mm_vision_tower."""
    text, vision = specs["text_decoder"], specs["vision_encoder"]
    own = dict(source.config or {}) if source.layout == "llava" else {}
    return {
        **LLAVA_DEFAULTS,
        "tokenizer_model_max_length": text.language_max_sequence_length,
        **own,
        **hf_config("text_decoder", text, dtype),
        **tokens,
        **projector_config(specs["vision_projector"]),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_select_feature": vision.select_feature,
        "mm_vision_select_layer": vision.select_layer,
        "mm_vision_tower": vision_encoder,
        "vocab_size": rows,
    }


def own_vision_encoder_name(source: Source) -> str | None:
    """The hub name by which a liuhaotian source calls its vision encoder; None where it is a path."""
    name = (source.config or {}).get("mm_vision_tower") if source.layout == "llava" else None
    known = isinstance(name, str) and name and not (source.path / name).exists() and not Path(name).is_absolute()
    return name if known and not name.startswith(".") else None
