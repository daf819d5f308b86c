"""What a part of the model is: its spec, its weight rules and how it is built. One part = one file.

A Spec's keys are those of the public ancestor's model.json. Keys that cannot change our result are accepted at the
one value that describes what we do; any other value is refused with the reason, never ignored.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch

from mindspeed_mm.config.file_keys import FileKeys
from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.adapters.spec import LoraSpec
from mindspeed_mm.models.known import model_types
from mindspeed_mm.models.operations import CrossShape, EncoderWork, Grid, LayerShape, Product
from mindspeed_mm.registry import find, find_all
from mindspeed_mm.weights.layouts import INTERACTION, Layout
from mindspeed_mm.weights.rules import Geometry, RuleSet

SLOTS = ("text_decoder", "vision_encoder", "vision_projector")
"""The places that every model fills with a part, named as in a model.json."""

ALL_SLOTS = (*SLOTS, INTERACTION)
"""With the place that a model may leave empty, between the decoder's final norm and its head."""

DEFAULT_MODEL_IDS = {
    "text_decoder": "llama",
    "vision_encoder": "clip",
    "vision_projector": "mlp",
    INTERACTION: "post_block",
}
"""Implementation where a block gives no model_id (the ancestor's text_decoder has none), and where weights say no more
than which slot they fill."""

Size = Annotated[int, pydantic.Field(gt=0)]
"""A positive integer."""


def _check_stage_layers(value: list[Any]) -> list[Any]:
    lists = value if value and isinstance(value[0], list) else [value]
    counts = [count for entry in lists if isinstance(entry, list) for count in entry]
    even = all(isinstance(entry, list) and len(entry) == len(lists[0]) for entry in lists)
    if not counts or not even or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(
            f"found {value}, expected the number of layers of each pipeline stage such as [5, 9, 9, 9]; with virtual "
            "stages one such list for each of them, all of one length"
        )
    return value


StageLayers = Annotated[list[Any], pydantic.AfterValidator(_check_stage_layers)]
"""Layers of each pipeline stage; with virtual stages one such list for each of them, as in the ancestor's files."""

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def flat_layers(layers: StageLayers) -> list[int]:
    """Layers of each chunk in the order in which a batch passes them: all stages of a virtual stage, then the next."""
    return [count for entry in layers for count in (entry if isinstance(entry, list) else [entry])]


def only(*allowed: Any, why: str) -> pydantic.AfterValidator:
    """A validator that accepts the given values alone and says why."""

    def check(value: Any) -> Any:
        if value not in allowed:
            expected = " or ".join(repr(item) for item in allowed)
            raise ValueError(f"found {value!r}, only {expected} is supported: {why}")
        return value

    return pydantic.AfterValidator(check)


NoFusion = Annotated[bool, only(False, why="kernels are chosen by the platform, not by the model config")]
NoDropout = Annotated[float, only(0.0, why="models of the LLaVA family are trained without dropout")]


LearningRate = Annotated[float, pydantic.Field(gt=0)]
WeightDecay = Annotated[float, pydantic.Field(ge=0)]


class ParameterRule(StrictModel):
    """How some parameters of a part are trained; keys that are left out say nothing."""

    names: str
    """Shell pattern of names as they stand in a checkpoint behind the part's own, such as "decoder.layers.[0-7].*"."""
    freeze: bool | None = None
    lr: LearningRate | None = None
    weight_decay: WeightDecay | None = None
    rows: list[Annotated[int, pydantic.Field(ge=0)]] | None = None
    """Of the words' embeddings or of the head: train the rows of these token ids alone. Weight decay, which would move
    all others, is off."""

    @pydantic.model_validator(mode="after")
    def _rows_are_trained(self) -> "ParameterRule":
        if self.rows is not None and (self.freeze is not False or self.weight_decay or not self.rows):
            raise ValueError(
                f"found rows {self.rows} with freeze {str(self.freeze).lower()} and weight_decay {self.weight_decay}; "
                "expected token ids, freeze false, and no weight_decay, which would move the other rows. Correct the "
                "rule"
            )
        return self


class PartSpec(StrictModel):
    """Keys that every part has, and what it states about its work."""

    independent_rows: ClassVar[bool] = True
    """Of an encoder: whether each row of pixels is encoded by itself, so that ranks may share the rows. Of a projector:
    whether each feature is projected by itself."""
    outer_norms: ClassVar[int] = 0
    """Norms of a vision encoder before or behind its layers."""

    freeze: bool = False
    lr: LearningRate | None = None
    """Highest learning rate of the part; None: the run's. The lowest keeps its ratio to it."""
    weight_decay: WeightDecay | None = None
    """None: the run's. Biases and parameters of one dimension have none."""
    layer_decay: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    """Learning rate of a layer over that of the next one; what stands behind the layers has the part's."""
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    """Store the weights of the layers' linears in 4 or 8 bits, where they are not trained: QLoRA, or a frozen part."""
    double_quant: bool = False
    """Of a part that is quantised: store the scales in 8 bits, too."""
    parameters: list[ParameterRule] = []
    """Rules for single parameters; the last one that fits decides (models/trainable.py)."""
    lora: LoraSpec | None = None
    """Train adapters beside the frozen linears instead of the part's own parameters."""
    ckpt_path: str | None = None
    """Weights in any readable layout. None (or "") means random init, which must then be declared by `fresh`."""
    fresh: bool = False
    """Random init is intended when there is no ckpt_path."""
    params_dtype: Literal["fp32", "float32", "fp16", "float16", "half", "bf16", "bfloat16"] | None = None
    """Type of the parameters at inference. In training --bf16 and --fp16 decide, and a difference is logged."""
    bf16: bool = False
    fp16: bool = False
    """bf16 and fp16 repeat params_dtype in the ancestor's files, and contradict it in one: params_dtype decides."""
    init_method_std: Annotated[float, pydantic.Field(ge=0)] = 0.02
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["block", "uniform"] | None = None
    recompute_num_layers: Size | None = None
    attention_dropout: NoDropout = 0.0
    hidden_dropout: NoDropout = 0.0
    bias_activation_fusion: NoFusion = False
    bias_dropout_fusion: NoFusion = False
    apply_rope_fusion: NoFusion = False
    apply_query_key_layer_scaling: Annotated[
        bool, only(False, why="it only rescales fp16 scores, which our attention computes in fp32")
    ] = False
    attention_softmax_in_fp32: Annotated[bool, only(True, why="attention always takes its softmax in fp32")] = True
    layernorm_zero_centered_gamma: Annotated[bool, only(False, why="public weights store the norm's factor itself")] = (
        False
    )
    persist_layer_norm: bool = True
    deallocate_pipeline_outputs: bool = True
    """The last two choose kernels and buffers of the ancestor's core; they change no number and are not used here."""

    @pydantic.field_validator("ckpt_path")
    @classmethod
    def _empty_path_is_none(cls, value: str | None) -> str | None:
        return value or None

    @pydantic.model_validator(mode="after")
    def _lora_trains(self) -> "PartSpec":
        if self.lora is not None and self.freeze:
            raise ValueError(
                "found lora in a part with freeze true; expected one of them: lora freezes the part's own parameters "
                "and trains the adapters. Remove one of them from model.json, or leave out the --lora flags, which "
                "give the text_decoder a lora block"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _stored_weights_are_frozen(self) -> "PartSpec":
        if self.quantize is not None and self.lora is None and not self.freeze:
            raise ValueError(
                f'found quantize "{self.quantize}" in a part whose own weights are trained; expected lora, which '
                "trains adapters beside them, or freeze true. Add one of them (--lora-r for the text_decoder), or "
                "remove quantize (--quantize)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _scales_are_there(self) -> "PartSpec":
        if self.double_quant and self.quantize is None:
            raise ValueError(
                "found double_quant in a part without quantize; expected both, since it stores the scales of quantised "
                "weights in fewer bits. Add quantize (--quantize), or remove double_quant (--double-quant)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _dora_needs_whole_weights(self) -> "PartSpec":
        if self.quantize is not None and self.lora is not None and self.lora.use_dora:
            raise ValueError(
                f'found quantize "{self.quantize}" with lora.use_dora, which takes lengths of the whole weights at '
                "each step; expected one of them. Remove one"
            )
        return self

    @property
    def trains(self) -> bool:
        """Whether anything of the part is trained."""
        return not self.freeze or any(rule.freeze is False for rule in self.parameters)

    def frozen(self, name: str) -> bool:
        """Whether a parameter of the part is frozen where no rule says otherwise."""
        return self.freeze

    @property
    def dtype(self) -> torch.dtype | None:
        """params_dtype as torch's type; else what bf16 or fp16 say; else None."""
        if self.params_dtype:
            return DTYPES[self.params_dtype]
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def geometry(self) -> Geometry:
        """What the weight rules need to know."""
        raise NotImplementedError

    def encoder_work(self, rows: float, grids: Sequence[Grid]) -> EncoderWork:
        """Of a vision encoder: its work on some items; here rows are images or tiles of one size.

        Args:
            rows: rows of pixels of all items.
            grids: [I, 3] of them, as in Media, for encoders whose work depends on them.
        """
        positions = rows * self.num_positions
        return EncoderWork(
            rows=rows,
            pixels=rows * self.num_channels * self.image_size**2,
            positions=positions,
            patches=rows * (self.image_size // self.patch_size) ** 2,
            features=rows * self.num_image_tokens,
            pairs=positions * self.num_positions * self.num_built_layers,
            items=len(grids),
        )

    @property
    def feature_size(self) -> int:
        """Of a vision encoder or a projector: the width of its features."""
        return self.hidden_size

    @property
    def fresh_names(self) -> tuple[str, ...]:
        """Beginnings of names of tensors that stay at random values though the part has weights."""
        return ()

    def lacking(self, dialect: str) -> str | None:
        """Why weights under the names of a dialect cannot be those of this spec, and what to change; None: they can."""
        return None

    @property
    def reads_instructions(self) -> bool:
        """Of a projector: whether it reads the question about an image."""
        return False

    @property
    def layer(self) -> LayerShape:
        """Of a part of transformer layers: one of them."""
        return LayerShape(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            ffn_hidden_size=self.ffn_hidden_size,
            gated=self.gated_linear_unit,
            activation_saves=2 if self.gated_linear_unit or self.activation_func == "quick_gelu" else 1,
            norm_statistics=2 if self.normalization == "LayerNorm" else 1,
        )

    @property
    def cross_shape(self) -> CrossShape | None:
        """Of a decoder: its cross-attention to features beside the text; None where there is none."""
        return None

    def products(self, work: EncoderWork) -> tuple[Product, ...]:
        """Of a projector: its linears on the features of some items, in the order in which they run."""
        raise NotImplementedError

    @property
    def patch_channels(self) -> int:
        """Values of a patch of a vision encoder."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class Part:
    """One kind of part, found by the registry as `PART` of its file.

    kind: the slot that it fills.
    from_hf: the part's HF config -> Spec.
    model_types: HF model_type values of the configs that `from_hf` reads.
    keys: what is known of the keys of such a config, which `from_hf` checks.
    layouts: public layouts that hold this part alone, the one that is written first.
    image_processor: of an encoder, the preprocessor_config.json of all its releases at the size of a Spec.
    rules: dialect (see weights/sources.py) -> rules.
    checked: Spec fields that a source's config must confirm before its weights are loaded; checked_where: further ones,
        with the HF key that some configs lack.
    to_hf: (Spec, dtype) -> config that stock transformers reads; None where there is none.
    shapes: Spec -> shapes of our tensors by name, `{}` for the layer, those included that we do not build.
    with_form: of a part whose public configs leave out what its tensors show: weights -> their config with all of that.
    from_shapes: Spec of weights without a config, from shape(our name), the number of layers, and fields that the user
        gives; None where shapes do not suffice.
    """

    name: str
    kind: str
    Spec: type[PartSpec]
    from_hf: Callable[[dict[str, Any]], PartSpec]
    rules: dict[str, RuleSet]
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    checked: tuple[str, ...] = ()
    checked_where: dict[str, str] = field(default_factory=dict)
    to_hf: Callable[..., dict[str, Any]] | None = None
    with_form: Callable[[Any], dict[str, Any]] | None = None
    from_shapes: Callable[..., PartSpec] | None = None
    build: Callable[..., torch.nn.Module] | None = None
    model_types: tuple[str, ...] = ()
    keys: FileKeys | None = None
    layouts: tuple[Layout, ...] = ()
    image_processor: Callable[[Any], dict[str, Any]] | None = None

    def read_config(self, config: dict[str, Any], dialect: str) -> PartSpec:
        """The Spec that a source's config describes: a model.json's block for dialect "ours", else an HF config."""
        if dialect == "ours":
            return load_config(self.Spec, config, what=f"{self.kind} block beside the weights")
        return self.from_hf(config)


def find_part(kind: str, model_id: str) -> Part:
    """The part of one slot and name. Raises ConfigError for an unknown name, with the nearest one."""
    return find(f"mindspeed_mm.models.{kind}", model_id, "PART", what=f"{kind} model_id")


def block_path(kind: str) -> str:
    """Where a part's block stands in a model.json."""
    return f"image_encoder.{kind}" if kind in ("vision_encoder", "vision_projector") else kind


def part_of(kind: str, spec: PartSpec) -> Part:
    """The part that a spec belongs to."""
    return find_part(kind, spec.model_id)


def written_prefix(layout: Layout, part: Part) -> str:
    """What stands before a part's names where a layout is written."""
    own = part.layouts[0].written.get(part.kind, "") if part.layouts else ""
    return layout.written[part.kind].replace("{own}", own)


def part_block(kind: str, spec: PartSpec) -> dict[str, Any]:
    """One block of a model.json, with the values that differ from the defaults."""
    block = spec.model_dump(mode="json", exclude_defaults=True)
    return block if spec.model_id == DEFAULT_MODEL_IDS[kind] else {"model_id": spec.model_id, **block}


def all_parts(kind: str) -> dict[str, Part]:
    """Every part of one slot by its model_id."""
    return find_all(f"mindspeed_mm.models.{kind}", "PART")


def part_for_model_type(kind: str, model_type: str) -> Part:
    """The part that reads configs of a model_type. Raises ConfigError for one that no part reads, with the nearest."""
    known = model_types(kind)
    if model_type in known:
        return find_part(kind, known[model_type])
    close = difflib.get_close_matches(model_type, known, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(close)}" if close else f"known are {', '.join(sorted(known))}"
    raise ConfigError(
        f'no {kind} here reads model_type "{model_type}"; {hint}. Use weights of one of these; a {kind} of another '
        f"architecture would be a new file of mindspeed_mm/models/{kind} (docs/adding_a_family.md)"
    )
