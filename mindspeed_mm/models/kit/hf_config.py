"""Text decoders' config.json as transformers writes it, of any age: read into a Spec, and written.

Every key is one of three kinds: honoured (it becomes part of the Spec), neutral (it is known, and refused where it does
not have a value that changes nothing), harmless (it changes no number).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm.config.file_keys import COMMON, NO_CONFIG, OLD_OPTIONS, FileKeys, file_keys
from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.decoder_spec import DecoderSpec, WindowedSpec

FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "language_vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "hidden_act": "activation_func",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "initializer_range": "init_method_std",
}
"""Keys of nearly every decoder's config and the Spec's names for them."""

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
TYPE_KEYS = ("dtype", "torch_dtype")

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""Values of keys that a config.json may omit: the documented defaults of transformers' LlamaConfig. A decoder's file
says where its own differ."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_chunk_size": (None,),
    "attention_dropout": (0, None),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "bias": (False,),
    "clip_qkv": (None,),
    "embd_pdrop": (0, None),
    "embedding_multiplier": (1, None),
    "final_logit_softcapping": (None,),
    "hidden_activation": (None,),
    "hidden_dropout": (0, None),
    "is_causal": (True, None),
    **NO_CONFIG,
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "layer_types": (None,),
    "lm_head_bias": (False,),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "mlp_bias": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "partial_rotary_factor": (1, None),
    "qk_norm": (False, None),
    "query_pre_attn_scalar": (None,),
    "resid_pdrop": (0, None),
    "residual_multiplier": (1, None),
    "rope_condense_ratio": (1,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "use_bidirectional_attention": (False, None),
    "use_qk_norm": (False, None),
    "use_sliding_window": (False, None),
}
"""Keys that change numbers in some family, and the values with which they change none. Those that a decoder honours do
not count."""

HARMLESS = (*COMMON, *OLD_OPTIONS, "pretraining_tp", "max_window_layers", "original_max_position_embeddings")
"""Keys that change no number here: names, ids, what transformers returns and how it computes."""


@dataclass(frozen=True)
class HfFormat:
    """How the config.json of one decoder is read and written.

    model_types: the first is what we write; the others are read alike.
    defaults: values of honoured keys that differ from DEFAULTS, and further honoured keys with theirs.
    type_defaults: by further model_types, values that differ from these in turn.
    """

    spec: type[DecoderSpec]
    model_types: tuple[str, ...]
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    type_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For errors."""
        return f"{self.model_types[0]} text decoder config"

    @property
    def honoured(self) -> frozenset[str]:
        """Keys that become part of the Spec."""
        return frozenset({**DEFAULTS, **self.defaults, **dict.fromkeys((*ROPE_KEYS, *TYPE_KEYS))})

    @property
    def keys(self) -> FileKeys:
        """What is known of the config's keys."""
        supported = f"{self.architecture} without that"
        return file_keys(self.name, self.honoured, NEUTRAL, HARMLESS, supported)

    def fill(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with its documented defaults.

        Raises ConfigError for another architecture and for values that would change numbers here.
        """
        kind = config.get("model_type", self.model_types[0])
        if kind not in self.model_types:
            raise ConfigError(
                f'text decoder config: found model_type "{kind}"; expected one of {", ".join(self.model_types)}.'
            )
        layers = config.get("layer_types") if "layer_types" not in self.honoured else None
        plain = layers is not None and set(layers) <= {"full_attention"}
        self.keys.check(config | {"layer_types": None} if plain else config)
        full = {**DEFAULTS, **self.defaults, **self.type_defaults.get(kind, {}), **config}
        for key, what, wanted in (
            ("num_hidden_layers", "a whole number", int),
            ("rope_scaling", "an object, or null", dict | None),
            ("rope_parameters", "an object, or null", dict | None),
        ):
            if not isinstance(full.get(key), wanted):
                raise ConfigError(f"{self.name}: found {key} {full.get(key)!r:.80}; expected {what}. Correct it.")
        return full

    def spec_of(self, full: dict[str, Any], names: Mapping[str, str] | None = None, **options: Any) -> DecoderSpec:
        """The Spec of a filled config; `options` are further fields, or other values of the common ones.

        `names` are the config's keys of `options`, for errors.
        Raises ConfigError for sizes and rotary scalings that we do not build.
        """
        base, scaling, share = read_rope(full, self.name)
        if share != options.get("rotary_percent", 1.0):
            raise ConfigError(
                f"{self.name}: found a partial_rotary_factor of {share}; {self.architecture} rotates all channels of a "
                "head. Use weights of a supported model."
            )
        fields = {ours: full[theirs] for theirs, ours in FIELDS.items() if theirs in full}
        fields |= {"rotary_base": base, "rope_scaling": scaling}
        fields |= {"params_dtype": full.get("dtype") or full.get("torch_dtype")}
        common = {ours: theirs for theirs, ours in FIELDS.items() if ours not in options}
        keys = {**common, **(names or {})}
        longest = "max_position_embeddings"
        keys["language_max_sequence_length"] = keys.get(longest, longest)  # follows from it
        return load_config(self.spec, {**fields, **options}, what=self.name, names=keys)

    def write(self, spec: DecoderSpec, dtype: str, **extra: Any) -> dict[str, Any]:
        """config.json with keys that transformers of every age reads; `dtype` as HF names it."""
        common = {theirs: getattr(spec, ours) for theirs, ours in FIELDS.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_types[0],
            **common,
            "rope_theta": spec.rotary_base,
            "rope_scaling": written_scaling(spec),
            **extra,
            "torch_dtype": dtype,
        }


def check_head_width(what: str, config: dict[str, Any], width: str, heads: str) -> None:
    """Raise ConfigError where the heads do not fill a width and no key says how wide a head is. What is no whole number
    is left to the Spec."""
    found = (config[width], config[heads])
    if all(type(value) is int and value > 0 for value in found) and found[0] % found[1]:
        raise ConfigError(
            f"{what}: found {width} {found[0]} and {heads} {found[1]}; expected a width that is a multiple of the "
            "heads. Correct one of them."
        )


def read_rope(config: dict[str, Any], what: str) -> tuple[float, dict[str, Any] | None, float]:
    """(base, scaling, share of a head's channels that is rotated), from rope_theta + rope_scaling (before transformers
    5) or rope_parameters (since).

    Raises ConfigError where layers rotate in different ways.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(
            f"{what}: found rope_parameters of their own for {', '.join(nested)}; expected one set for all layers. Use "
            "weights of a supported model."
        )
    base = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    share = parameters.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return base, None, share
    positions = config["max_position_embeddings"]
    if kind in ("llama3", "yarn", "longrope"):
        parameters.setdefault("original_max_position_embeddings", positions)
        if config.get("original_max_position_embeddings"):
            parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if kind == "yarn" and parameters.get("factor") is None:
        parameters["factor"] = positions / parameters["original_max_position_embeddings"]
    return base, parameters, share


def written_scaling(spec: DecoderSpec) -> dict[str, Any] | None:
    """rope_scaling of a config.json."""
    return spec.rope_scaling.model_dump(mode="json", exclude_none=True) if spec.rope_scaling else None


WINDOW_DEFAULTS: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
"""Qwen's keys of sliding windows: the layers from max_window_layers on have one, where use_sliding_window is true."""


def read_windows(full: dict[str, Any]) -> dict[str, Any]:
    """Fields of a WindowedSpec from Qwen's keys."""
    window = full["sliding_window"] if full["use_sliding_window"] else None
    if window is None:
        return {"sliding_window": None}
    first, layers = full["max_window_layers"], full["num_hidden_layers"]
    kinds = full["layer_types"]
    if kinds is None and not isinstance(first, int):
        raise ConfigError(f"found max_window_layers {first!r:.80}; expected a whole number. Correct it.")
    if kinds is None:
        kinds = ["sliding_attention" if number >= first else "full_attention" for number in range(layers)]
    return {"sliding_window": window, "layer_types": list(kinds)}


def written_windows(spec: WindowedSpec) -> dict[str, Any]:
    """Qwen's keys of a WindowedSpec, for transformers of every age: those before 4.53 have no layer_types."""
    if spec.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": spec.num_layers}
    kinds = list(spec.layer_types or spec.default_layer_types())
    full = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
    return {
        "use_sliding_window": True,
        "sliding_window": spec.sliding_window,
        "max_window_layers": full,
        "layer_types": kinds,
    }
