"""Where the config of each part sits in a public config.json."""

from typing import Any

from mindspeed_mm.errors import WeightError

SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's mm_vision_select_feature in HF's words (vision_feature_select_strategy)."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text decoder's config inside a llava-hf config, with the head's tying as the outer config has it."""
    inner = dict(config.get("text_config") or {})
    if "tie_word_embeddings" in config:
        inner["tie_word_embeddings"] = config["tie_word_embeddings"]
    return inner


def vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """The vision encoder's config inside a llava-hf config, with the feature selection of the outer config."""
    keys = ("vision_feature_layer", "vision_feature_select_strategy")
    return {**(config.get("vision_config") or {}), **{key: config[key] for key in keys if key in config}}


def vision_select(config: dict[str, Any]) -> dict[str, Any]:
    """HF's two vision_feature keys from a liuhaotian config (mm_vision_select_layer, mm_vision_select_feature)."""
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in SELECT_STRATEGIES:
        raise WeightError(
            f"config.json: found mm_vision_select_feature {feature!r}; expected patch or cls_patch. Correct the file."
        )
    return {
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT_STRATEGIES[feature],
    }
