"""adapter_config.json of the peft library: the keys that say what an adapter computes, and those that do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic

from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.weights.files import read_json_object

KIND = "LORA"
"""The only peft_type that is read."""

MERGE = "Merge the adapter with PEFT (merge_and_unload) and give the merged weights"

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
}
"""Keys at which another value would change the result."""

_FIRST_VALUES = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""init_lora_weights that leave the base weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take something off
them, so that A and B as trained belong to other weights than those of the base's folder."""

_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
}
"""Keys of training, and of which modules have adapters or are whole, which the tensors' names say."""


class PeftConfig(StrictModel):
    """What is read of an adapter_config.json; defaults are those of peft.LoraConfig."""

    r: Annotated[int, pydantic.Field(gt=0)] = 8
    lora_alpha: Annotated[float, pydantic.Field(gt=0)] = 8.0
    lora_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


def read_config(path: Path) -> PeftConfig:
    """Read and check an adapter_config.json.

    Raises:
        WeightError: it is another kind of adapter than LoRA, or has a value that changes what it computes.
        ConfigError: a value of another type, or keys that are not known and say something.
    """
    values = read_json_object(path)
    kind = values.get("peft_type")
    if kind != KIND:
        found = "no peft_type" if kind is None else f"peft_type {kind!r}"
        raise WeightError(f"{path}: found {found}; expected {KIND!r}, the only one that is supported. {MERGE}")
    for key, allowed in _MUST_BE.items():
        if key in values and values[key] not in allowed:
            raise WeightError(
                f"{path}: found {key} {values[key]!r}; expected {allowed[0]!r}, the only one that is supported. {MERGE}"
            )
    first = values.get("init_lora_weights")
    if first not in _FIRST_VALUES:
        raise WeightError(
            f"{path}: found init_lora_weights {first!r}, which changes the base weights before the training; expected "
            "an adapter of the base as it is. Save it with PEFT's path_initial_model_for_weight_conversion. Or: "
            f"{MERGE[0].lower()}{MERGE[1:]}"
        )
    known = {"peft_type", "init_lora_weights", *_MUST_BE, *_NO_MATTER, *PeftConfig.model_fields}
    unknown = {key: value for key, value in values.items() if key not in known and value not in (None, False, [], {})}
    if unknown:
        said = ", ".join(f"{key} {value!r}" for key, value in unknown.items())
        raise ConfigError(
            f"{path}: found keys that are not known: {said}; expected those of peft.LoraConfig. They may change what "
            f"the adapter computes. If they do not, remove them. Else: {MERGE[0].lower()}{MERGE[1:]}"
        )
    stated = {key: value for key, value in values.items() if key in PeftConfig.model_fields}
    return load_config(PeftConfig, stated, what="adapter config", context=str(path))
