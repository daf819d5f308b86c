"""LLaVA's projectors: linears with an activation between them. Spec, weight rules.

The original code has GELU (erf) and biases, in `linear` (one) and `mlpNx_gelu`. transformers' configs choose the
activation of two linears, and whether they have biases.
"""

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.operations import EncoderWork, Product
from mindspeed_mm.models.part import Part, PartSpec, Size, only
from mindspeed_mm.weights.layouts import PROJECTOR, Layout, Prefix
from mindspeed_mm.weights.rules import Geometry, Rule, RuleSet

TokenId = Annotated[int, pydantic.Field(ge=0)]

WHY = "the projector's linears have no gate"

Activation = Literal[
    "gelu",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "leaky_relu",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
]
"""transformers' names of the activations that have no parameters."""

ACTIVATIONS = get_args(Activation)

KEEP_RESULT = ("relu", "sigmoid", "tanh")
"""Activations whose derivative follows from their result, which the next linear keeps as well."""


class MlpSpec(PartSpec):
    """image_encoder.vision_projector block of a model.json."""

    model_id: Literal["mlp"] = "mlp"
    fresh: bool = True
    """The projector is what pretraining makes, so a null ckpt_path is normal."""
    num_layers: Size = 2
    """Linears: 1 is LLaVA's `linear`, N its `mlpNx_gelu`."""
    num_attention_heads: Annotated[int, only(1, why="the projector has no attention")] = 1
    input_size: Size
    """Width of the vision encoder."""
    ffn_hidden_size: Size = None  # hidden_size, as LLaVA has it
    """Width between the linears."""
    hidden_size: Size
    """Width of the text decoder."""
    activation_func: Activation = "gelu"
    """Between the linears; transformers' projector_hidden_act."""
    gated_linear_unit: Annotated[bool, only(False, why=WHY)] = False
    add_bias_linear: bool = True
    """Whether the linears have biases; transformers' multimodal_projector_bias."""
    image_start_end: Annotated[list[TokenId], pydantic.Field(min_length=2, max_length=2)] | None = None
    """Tokens before and behind the features of an image: LLaVA v1.0's <im_start> and <im_end>
    (mm_use_im_start_end)."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("ffn_hidden_size") is None:
            data = {**data, "ffn_hidden_size": data.get("hidden_size")}
        return data

    @pydantic.model_validator(mode="after")
    def _one_linear_has_no_inside(self) -> "MlpSpec":
        if self.num_layers == 1 and self.ffn_hidden_size != self.hidden_size:
            raise ValueError(
                f"ffn_hidden_size {self.ffn_hidden_size} is a width between linears, of which num_layers 1 has none; "
                "leave it out"
            )
        if self.num_layers == 1 and self.activation_func != "gelu":
            raise ValueError(
                f'activation_func "{self.activation_func}" stands between linears, of which num_layers 1 has none; '
                "leave it out"
            )
        return self

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(input, output) of each linear."""
        inside = [self.ffn_hidden_size] * (self.num_layers - 1)
        return list(zip([self.input_size, *inside], [*inside, self.hidden_size], strict=True))

    def products(self, work: EncoderWork) -> tuple[Product, ...]:
        """The first linear keeps what the encoder gives, a class token included; activations keep their inputs."""
        rows, tensors = work.features, 2 if self.activation_func == "quick_gelu" else 1
        return tuple(
            Product(
                rows,
                inputs,
                outputs,
                kept=work.positions * self.input_size if number == 0 else rows * inputs,
                activated=tensors * rows * inputs if number else 0.0,
                shared=number > 0 and self.activation_func in KEEP_RESULT,
                split=number % 2 == 1,
            )
            for number, (inputs, outputs) in enumerate(self.sizes)
        )

    @property
    def geometry(self) -> Geometry:
        return Geometry(num_layers=self.num_layers, linear_bias=self.add_bias_linear)


def from_hf(config: dict[str, Any]) -> MlpSpec:
    """MlpSpec of a llava-hf config (text_config and vision_config inside) or of an original LLaVA config (mm_* keys).

    Raises ConfigError for another projector.
    """
    linears, chosen = 2, {}
    if "mm_projector_type" in config or "mm_hidden_size" in config:
        linears = _count_linears(config.get("mm_projector_type", "linear"))  # LLaVA's builder: absent means linear
        if "mm_hidden_size" not in config:
            raise ConfigError("projector config: mm_hidden_size is missing; add the width of the vision encoder.")
        sizes = (config["mm_hidden_size"], config.get("hidden_size", 4096))
    else:
        chosen = _chosen(config)
        layers = config.get("vision_feature_layer", -2)
        sizes = (
            config.get("vision_config", {}).get("hidden_size", 768) * (len(layers) if isinstance(layers, list) else 1),
            config.get("text_config", {}).get("hidden_size", 4096),
        )
    block = {"num_layers": linears, "input_size": sizes[0], "hidden_size": sizes[1], **chosen}
    return load_config(MlpSpec, block, what="projector config")


def _chosen(config: dict[str, Any]) -> dict[str, Any]:
    """Activation and biases of a llava-hf config, as far as it says other than the usual."""
    activation, bias = config.get("projector_hidden_act", "gelu"), config.get("multimodal_projector_bias", True)
    if activation not in ACTIVATIONS or type(bias) is not bool:
        raise ConfigError(
            f"projector config: found projector_hidden_act {json.dumps(activation)} and multimodal_projector_bias "
            f"{json.dumps(bias)}; expected true or false, and one of {', '.join(ACTIVATIONS)}. Use weights of a "
            "supported model."
        )
    return ({} if activation == "gelu" else {"activation_func": activation}) | (
        {} if bias else {"add_bias_linear": False}
    )


def _count_linears(kind: Any) -> int:
    """Linears of an mm_projector_type."""
    if kind == "linear":
        return 1
    found = re.fullmatch(r"mlp([1-9][0-9]*)x_gelu", kind) if isinstance(kind, str) else None
    if found is None:
        reason = " (it has no weights: the vision encoder's features go into the decoder as they are)"
        raise ConfigError(
            f'projector config: found mm_projector_type "{kind}"{reason if kind == "identity" else ""}; linear and '
            "mlpNx_gelu (N linears with GELU between them) are supported. Give weights with one of these."
        )
    return int(found[1])


def from_shapes(shape: Callable[[str], tuple[int, ...]], num_layers: int, **given: Any) -> MlpSpec:
    """MlpSpec of weights without a config, from the shapes of its `num_layers` linears."""
    inside, input_size = shape("encoder.linear_fc1.weight")
    hidden_size = shape(f"encoder.linear_fc{max(num_layers, 1)}.weight")[0]
    block = {"num_layers": num_layers, "input_size": input_size, "hidden_size": hidden_size}
    return load_config(
        MlpSpec, {**block, "ffn_hidden_size": inside, **given}, what="projector (from the shapes of its weights)"
    )


def projector_prefixes(outer: str) -> tuple[Prefix, ...]:
    """LLaVA's projector: an nn.Sequential, or for type linear one nn.Linear, which the rules know as its number 0."""
    return Prefix(outer, PROJECTOR), *(Prefix(outer + name, PROJECTOR, "0." + name) for name in ("weight", "bias"))


def projector_type(spec: MlpSpec) -> str:
    """LLaVA's mm_projector_type."""
    return "linear" if spec.num_layers == 1 else f"mlp{spec.num_layers}x_gelu"


def to_hf(spec: MlpSpec, dtype: str) -> dict[str, Any]:
    """The keys of LLaVA's original config.json that describe the projector. Raises WeightError where it has none."""
    if spec.activation_func != "gelu" or not spec.add_bias_linear:
        raise WeightError(
            f'the projector has activation_func "{spec.activation_func}" and add_bias_linear '
            f"{json.dumps(spec.add_bias_linear)}; expected gelu and biases, which is all that LLaVA's own code makes. "
            "Choose --to llava-hf, llava_next or mindspeed-mm."
        )
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


def _rules(linear: str) -> RuleSet:
    """Linears are split over the tensor-parallel ranks in pairs, first by rows, then by columns; see modules/mlp.py."""
    ours = "encoder.linear_fc{layer+1}"
    return RuleSet(
        (
            Rule(f"{ours}.weight", (f"{linear}.weight",), axis=0, layer_stride=(0, 2)),
            Rule(f"{ours}.bias", (f"{linear}.bias",), axis=0, needs="linear_bias", layer_stride=(0, 2)),
            Rule(f"{ours}.weight", (f"{linear}.weight",), axis=1, layer_stride=(1, 2)),
            Rule(f"{ours}.bias", (f"{linear}.bias",), needs="linear_bias", layer_stride=(1, 2)),
        )
    )


LLAVA_RULES = _rules("{2*layer}")
HF_RULES = _rules("linear_{layer+1}")


PROJECTOR_ONLY = Layout(
    "projector",
    (r"(^|\.)mm_projector\.|^(0\.)?(weight|bias)$",),
    (
        *projector_prefixes("model.mm_projector."),
        *projector_prefixes("mm_projector."),
        *projector_prefixes("")[1:],
        *(Prefix(digit, PROJECTOR, digit) for digit in "0123456789"),
    ),
    {PROJECTOR: "llava"},
    {PROJECTOR: "model.mm_projector."},
)
"""mm_projector.bin, what LLaVA's pretraining gives."""


def shapes(spec: MlpSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors."""
    result: dict[str, tuple[int, ...]] = {}
    for number, (inputs, outputs) in enumerate(spec.sizes, start=1):
        name = f"encoder.linear_fc{number}"
        result |= {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if spec.add_bias_linear else {})
    return result


def build(spec: MlpSpec, runtime):
    """The projector."""
    from mindspeed_mm.models.kit.linears import MLPProjector

    return MLPProjector(spec, runtime)


PART = Part(
    name="mlp",
    kind="vision_projector",
    Spec=MlpSpec,
    layouts=(PROJECTOR_ONLY,),
    to_hf=to_hf,
    from_hf=from_hf,
    from_shapes=from_shapes,
    rules={"llava": LLAVA_RULES, "hf": HF_RULES, "ours": LLAVA_RULES.own()},
    shapes=shapes,
    build=build,
    checked=("num_layers", "input_size", "hidden_size", "activation_func", "add_bias_linear"),
)
