"""BLIP-2's bridge (Li et al. 2023): a norm, the Q-Former, and a linear into the decoder's width. Spec, weight rules.

The Q-Former is a BERT whose queries are learned. Every second layer attends to the encoder's features. With a text
branch (InstructBLIP, Dai et al. 2023) the words of the instruction stand behind the queries in self-attention.
Letters: W width of the Q-Former, F its MLP's, Hv of the encoder, H of the decoder, Q queries.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.operations import EncoderWork, Product
from mindspeed_mm.models.part import Part, PartSpec, Size, only
from mindspeed_mm.weights.layouts import PROJECTOR, Prefix
from mindspeed_mm.weights.rules import Drop, Geometry, Rule, RuleSet

CROSS_EVERY = 2
"""Every how many layers, from the first on, attend to the encoder's features; in all releases."""

KEYS = {
    "width": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_attention_heads": ("num_attention_heads", 12),
    "ffn_hidden_size": ("intermediate_size", 3072),
    "activation_func": ("hidden_act", "gelu"),
    "layernorm_epsilon": ("layer_norm_eps", 1e-12),
    "cross_attention_every": ("cross_attention_frequency", CROSS_EVERY),
}
"""Our keys, those of HF's qformer_config, and the value where it has none (transformers' Blip2QFormerConfig)."""

TEXT_KEYS = {"text_vocab_size": ("vocab_size", 30522), "text_positions": ("max_position_embeddings", 512)}
"""The same of the text branch."""


@dataclass(frozen=True)
class QFormerGeometry(Geometry):
    """A Geometry that says whether there is a text branch, and whether weights hold the linear."""

    text: bool = False
    linear: bool = True


class QFormerSpec(PartSpec):
    """image_encoder.vision_projector block of a model.json."""

    independent_rows = False

    model_id: Literal["qformer"] = "qformer"
    input_size: Size
    """Width of the vision encoder."""
    hidden_size: Size
    """Width of the text decoder."""
    width: Size = 768
    num_layers: Size = 12
    num_attention_heads: Size = 12
    ffn_hidden_size: Size = 3072
    num_query_tokens: Size = 32
    """Features of an image behind the projector."""
    cross_attention_every: Annotated[int, only(CROSS_EVERY, why="all released Q-Formers have it so")] = CROSS_EVERY
    text_vocab_size: Size | None = None
    """Words of the text branch, which takes the instruction; None: there is no text branch."""
    text_positions: Size | None = None
    """Longest instruction, in words of the text branch."""
    text_pad_token_id: Annotated[int, pydantic.Field(ge=0)] = 0
    vision_norm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-6
    """Of the norm in front of the Q-Former (ln_vision)."""
    layernorm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-12
    train_linear_only: bool = False
    """Keep the norm, the queries and the Q-Former frozen where the part is trained, as MiniGPT-4 does."""
    fresh_linear: bool = False
    """Begin with a random linear behind a Q-Former that has weights (MiniGPT-4's first stage)."""
    feature_scale: Annotated[float, pydantic.Field(gt=0)] | None = None
    """Factor on the features behind the linear (see the family minigpt4); None: 1."""
    activation_func: Annotated[str, only("gelu", why="the Q-Former has GELU (erf)")] = "gelu"
    gated_linear_unit: Annotated[bool, only(False, why="the Q-Former's MLP has no gate")] = False
    add_bias_linear: Annotated[bool, only(True, why="the Q-Former's linears have biases")] = True
    add_qkv_bias: Annotated[bool, only(True, why="the Q-Former's linears have biases")] = True
    normalization: Annotated[str, only("LayerNorm", why="the Q-Former has LayerNorm")] = "LayerNorm"

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "QFormerSpec":
        if self.width % self.num_attention_heads:
            raise ValueError(
                f"width {self.width} is not divisible by num_attention_heads {self.num_attention_heads}; correct one"
            )
        if (self.text_vocab_size is None) != (self.text_positions is None):
            raise ValueError(
                f"found text_vocab_size {self.text_vocab_size} and text_positions {self.text_positions}; a text branch "
                "needs both, a Q-Former without one has neither"
            )
        return self

    @property
    def reads_instructions(self) -> bool:
        """Whether there is a text branch."""
        return self.text_vocab_size is not None

    @property
    def fresh_names(self) -> tuple[str, ...]:
        """See PartSpec."""
        return ("linear_projection.",) if self.fresh_linear else ()

    @property
    def num_query_groups(self) -> int:
        """Plain multi-head attention."""
        return self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Channels of a head."""
        return self.width // self.num_attention_heads

    def frozen(self, name: str) -> bool:
        return self.freeze or (self.train_linear_only and not name.startswith("linear_projection."))

    def products(self, work: EncoderWork) -> tuple[Product, ...]:
        """Keys and values of cross-attention on all features, then all that runs on queries, products of one shape
        together, attention's own among them. Norms and the text branch, which are short, are left out."""
        width, layers, queries = self.width, self.num_layers, work.rows * self.num_query_tokens
        crossing, inner = -(-layers // CROSS_EVERY), layers * queries * self.ffn_hidden_size
        places, own = round(work.positions / work.rows) if work.rows else 0, self.num_query_tokens
        looked_at = queries + 2 * work.positions
        return (
            Product(work.positions, self.input_size, 2 * crossing * width, kept=2 * work.positions * self.input_size),
            Product(queries, width, (4 * layers + 2 * crossing) * width, kept=5 * layers * queries * width),
            Product(queries, own, 2 * layers * width, kept=layers * queries * width, keys=own),
            Product(queries, places, 2 * crossing * width, kept=crossing * looked_at * width, keys=places),
            Product(queries, width, layers * self.ffn_hidden_size, kept=layers * queries * width),
            Product(queries, self.ffn_hidden_size, layers * width, kept=inner, activated=inner, split=True),
            Product(queries, width, self.hidden_size, kept=queries * width),
        )

    @property
    def geometry(self) -> QFormerGeometry:
        return QFormerGeometry(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            text=self.reads_instructions,
            linear=not self.fresh_linear,
        )


def from_hf(config: dict[str, Any]) -> QFormerSpec:
    """QFormerSpec of a Blip2Config or InstructBlipConfig. Raises ConfigError for what is not built here."""
    inner, vision = dict(config.get("qformer_config") or {}), config.get("vision_config") or {}
    text = config.get("text_config") or {}
    config_keys.QFORMER.check(inner)
    if inner.get("use_qformer_text_input"):
        raise ConfigError(
            "qformer_config: found use_qformer_text_input true; expected false. That Q-Former matches images and "
            "texts, and no decoder follows it: give weights of Blip2ForConditionalGeneration."
        )
    keys = KEYS | (TEXT_KEYS if config.get("model_type") == "instructblip" else {})
    block = {ours: inner.get(theirs, default) for ours, (theirs, default) in keys.items()}
    if config.get("model_type") == "instructblip":
        block["text_pad_token_id"] = inner.get("pad_token_id") or 0
    sizes = {
        "input_size": vision.get("hidden_size", 1408),
        "hidden_size": text.get("hidden_size", 768),
        "num_query_tokens": config.get("num_query_tokens", 32),
        "vision_norm_epsilon": config.get("vision_norm_eps", vision.get("layer_norm_eps", 1e-6)),
        "feature_scale": config.get("feature_scale"),
    }
    names = {ours: theirs for ours, (theirs, _) in keys.items()}
    return load_config(QFormerSpec, block | sizes, what="projector config", names=names)


def to_hf(spec: QFormerSpec, dtype: str) -> dict[str, Any]:
    """The qformer_config of a Blip2Config, or of an InstructBlipConfig where there is a text branch."""
    keys = KEYS | (TEXT_KEYS if spec.reads_instructions else {})
    return {
        "model_type": "instructblip_qformer" if spec.reads_instructions else "blip_2_qformer",
        **{theirs: getattr(spec, ours) for ours, (theirs, _) in keys.items()},
        "encoder_hidden_size": spec.input_size,
        "pad_token_id": spec.text_pad_token_id,
        "torch_dtype": dtype,
    }


_LAYER = "encoder.layers.{}."
_SELF, _CROSS, _MLP, _TEXT_MLP = (
    _LAYER + name for name in ("self_attention.", "cross_attention.", "mlp.", "text_mlp.")
)


def _pair(ours: str, theirs: str, axis: int | None = None, **options: Any) -> tuple[Rule, Rule]:
    """Weight and bias of one linear or norm; a row-parallel linear (axis 1) has a replicated bias."""
    return (
        Rule(f"{ours}.weight", (f"{theirs}.weight",), axis, **options),
        Rule(f"{ours}.bias", (f"{theirs}.bias",), 0 if axis == 0 else None, **options),
    )


def _attention(ours: str, theirs: str, inner: str, **options: Any) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for short, name in {"q": "query", "k": "key", "v": "value"}.items():
        rules += _pair(f"{ours}linear_{short}", f"{theirs}.{inner}.{name}", 0, **options)
    rules += _pair(f"{ours}linear_proj", f"{theirs}.output.dense", 1, **options)
    return *rules, *_pair(f"{ours}norm", f"{theirs}.output.LayerNorm", **options)


def _mlp(ours: str, layer: str, suffix: str, **options: Any) -> tuple[Rule, ...]:
    return (
        *_pair(f"{ours}linear_fc1", f"{layer}.intermediate{suffix}.dense", 0, **options),
        *_pair(f"{ours}linear_fc2", f"{layer}.output{suffix}.dense", 1, **options),
        *_pair(f"{ours}norm", f"{layer}.output{suffix}.LayerNorm", **options),
    )


def _rules(
    *, qformer: str, norm: str, vision_norm: str, linear: str, inner: str = "attention", further: tuple[Drop, ...] = ()
) -> RuleSet:
    """The rules of one public form.

    Args:
        qformer: prefix of the Q-Former's tensors.
        norm: of the norm of its inputs, behind `qformer`, whose parent has the embeddings of words as well.
        vision_norm, linear: the norm before it, the linear behind it.
        inner: what an attention's linears for queries, keys and values stand under.
        further: tensors of the form that have no use here.
    """
    layer, words, text = qformer + "encoder.layer.{}", qformer + "embeddings.", {"needs": "text"}
    return RuleSet(
        (
            *_pair("vision_norm", vision_norm),
            Rule("query_tokens", ("query_tokens",)),
            Rule("text_embeddings.weight", (words + "word_embeddings.weight",), **text),
            Rule("text_positions.weight", (words + "position_embeddings.weight",), **text),
            *_pair("input_norm", qformer + norm),
            *_attention(_SELF, layer + ".attention", inner),
            *_attention(_CROSS, layer + ".crossattention", inner, layer_stride=(0, CROSS_EVERY)),
            *_mlp(_MLP, layer, "_query"),
            *_mlp(_TEXT_MLP, layer, "", **text),
            *_pair("linear_projection", linear, 0, needs="linear"),
            Drop(words + "position_ids"),
            *further,
        )
    )


_HF = {"qformer": "qformer.", "vision_norm": "vision_model.post_layernorm", "linear": "language_projection"}
HF_RULES = _rules(**_HF, norm="layernorm")
INSTRUCT_RULES = _rules(**_HF, norm="embeddings.layernorm")
"""transformers' Blip2 and InstructBlip classes."""

_UNUSED_TEXT = (
    *(f"embeddings.{name}_embeddings.weight" for name in ("word", "position")),
    *(f"encoder.layer.{{}}.{name}.*" for name in ("intermediate", "output")),
    "pooler.*",
)
LAVIS_RULES = _rules(
    qformer="Qformer.bert.",
    norm="embeddings.LayerNorm",
    vision_norm="ln_vision",
    linear="llama_proj",
    inner="self",
    further=tuple(Drop("Qformer.bert." + name) for name in _UNUSED_TEXT),
)
"""LAVIS and MiniGPT-4, whose files keep BERT's text branch for models that have none."""


PREFIXES = (Prefix("", PROJECTOR), Prefix("vision_model.post_layernorm.", PROJECTOR, "vision_model.post_layernorm."))
"""The projector in transformers' folders, where it has no prefix of its own: what no other part has is its."""


def shapes(spec: QFormerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, inner = spec.width, spec.ffn_hidden_size
    linears = {"linear_projection": (spec.hidden_size, width)}
    for attention, memory in ((_SELF, width), (_CROSS, spec.input_size)):
        linears |= {
            attention + "linear_q": (width, width),
            attention + "linear_k": (width, memory),
            attention + "linear_v": (width, memory),
            attention + "linear_proj": (width, width),
        }
    for mlp in (_MLP, _TEXT_MLP):
        linears |= {mlp + "linear_fc1": (inner, width), mlp + "linear_fc2": (width, inner)}
    result = {
        "query_tokens": (1, spec.num_query_tokens, width),
        "vision_norm.weight": (spec.input_size,),
        "vision_norm.bias": (spec.input_size,),
        "text_embeddings.weight": (spec.text_vocab_size or 0, width),
        "text_positions.weight": (spec.text_positions or 0, width),
    }
    for name, shape in linears.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("input_norm", *(f"{part}norm" for part in (_SELF, _CROSS, _MLP, _TEXT_MLP))):
        result |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return result


def build(spec: QFormerSpec, runtime):
    """The projector."""
    from mindspeed_mm.models.kit.qformer import QFormerProjector

    return QFormerProjector(spec, runtime)


PART = Part(
    name="qformer",
    kind="vision_projector",
    Spec=QFormerSpec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "instructblip": INSTRUCT_RULES, "lavis": LAVIS_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build,
    checked=("input_size", "hidden_size", "num_query_tokens", "vision_norm_epsilon", *KEYS),
)
