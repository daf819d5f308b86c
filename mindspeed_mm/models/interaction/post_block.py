"""The post-interaction block: behind the final norm, each text state looks at the image's features once more, and the
head reads what comes of it. Spec, weight rules.

One layer is cross-attention and an MLP, each behind a LayerNorm and added to its input. The features go through the
align linears and a LayerNorm first. A layer may have self-attention in place of cross-attention, or none. Letters: H
width of the decoder, F of the MLP, W of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.operations import Product
from mindspeed_mm.models.part import Part, PartSpec, Size, only
from mindspeed_mm.weights.layouts import INTERACTION, Layout, Prefix
from mindspeed_mm.weights.rules import Drop, Geometry, Rule, RuleSet
from mindspeed_mm.weights.sources import PartSource

WHY = "the block's linears have no biases but those of align"


@dataclass(frozen=True)
class PostBlockGeometry(Geometry):
    """A Geometry that says which linears the block has."""

    cross: bool = True
    of_text: bool = False
    mlp_alone: bool = False
    align_mlp: bool = True
    align_linear: bool = False


class PostBlockSpec(PartSpec):
    """interaction block of a model.json."""

    model_id: Literal["post_block"] = "post_block"
    fresh: bool = True
    """The block is what its training makes, so a null ckpt_path is normal."""
    features: Literal["vision_encoder", "vision_projector"] = "vision_encoder"
    """Whose features the text looks at; those of the projector are aligned once more ("align after align")."""
    align: Literal["mlp", "linear"] = "mlp"
    """What brings the features to the decoder's width: two linears with GELU between them, or one."""
    cross_attention: bool = True
    """False: norm and MLP alone, which look at no image."""
    self_attention: bool = False
    """In place of cross-attention: each position attends to the text up to itself, and to no image (the original's
    TransformerBlock)."""
    doubled_residual: bool = False
    """Add the block's input to its output once more, and begin at random values, as the original does: its head sees
    twice the hidden state. False: the block begins as the identity."""
    num_layers: Size = 1
    input_size: Size
    """Width of the features."""
    hidden_size: Size
    """Width of the decoder."""
    ffn_hidden_size: Size
    """Width inside the MLP and inside align; the original has the decoder's."""
    num_attention_heads: Size
    layernorm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-5
    activation_func: Annotated[str, only("silu", why="the block's MLP has SiLU")] = "silu"
    gated_linear_unit: Annotated[bool, only(False, why="the block's MLP has no gate")] = False
    add_bias_linear: Annotated[bool, only(False, why=WHY)] = False
    add_qkv_bias: Annotated[bool, only(False, why=WHY)] = False
    normalization: Annotated[str, only("LayerNorm", why="the block has LayerNorm")] = "LayerNorm"

    @pydantic.model_validator(mode="after")
    def _heads_share_the_width(self) -> PostBlockSpec:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; use a "
                "divisor"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_attention(self) -> PostBlockSpec:
        if self.self_attention and self.cross_attention:
            raise ValueError(
                "found self_attention true beside cross_attention, in whose place it stands; expected one of them. Set "
                "cross_attention to false"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _trained_as_it_is(self) -> PostBlockSpec:
        for key in ("lora", "quantize"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"found {key} in the interaction block, which is trained itself; expected it in the text_decoder "
                    "alone. Remove it"
                )
        return self

    @property
    def num_query_groups(self) -> int:
        """Plain multi-head attention."""
        return self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def align_sizes(self) -> list[tuple[int, int]]:
        """(input, output) of each linear of align; none where nothing looks at features."""
        if not self.cross_attention:
            return []
        inside = [self.ffn_hidden_size] if self.align == "mlp" else []
        return list(zip([self.input_size, *inside], [*inside, self.hidden_size], strict=True))

    @property
    def geometry(self) -> PostBlockGeometry:
        return PostBlockGeometry(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_attention_heads,
            kv_channels=self.kv_channels,
            cross=self.cross_attention,
            of_text=self.self_attention,
            mlp_alone=not (self.cross_attention or self.self_attention),
            align_mlp=self.cross_attention and self.align == "mlp",
            align_linear=self.cross_attention and self.align == "linear",
        )

    def head_products(self, supervised: float, features: float, lengths: Sequence[float]) -> tuple[Product, ...]:
        """The block's matrix products in a micro-batch, attention's own among them; norms are left out.

        Args:
            supervised: positions with a label, on which the block runs where it does not attend to the text.
            features: of all images; each position is taken to look at those of an equal share of them.
            lengths: positions of each sequence.
        """
        found = self._cross_products(supervised, features, len(lengths)) if self.cross_attention else []
        width, layers, inner = self.hidden_size, self.num_layers, self.ffn_hidden_size
        positions = sum(lengths) if self.self_attention else supervised
        once = layers * positions * width
        if self.self_attention:
            found.append(Product(positions, width, 3 * layers * width, kept=4 * once))
            pairs = sum(length * length for length in lengths) / 2  # of a position and one up to it
            found.append(Product(pairs, width, 2 * layers))
            found.append(Product(positions, width, layers * width, kept=once, split=True))
        found.append(Product(positions, width, layers * inner, kept=2 * once))
        within = layers * positions * inner
        found.append(Product(positions, inner, layers * width, kept=within, activated=within, split=True))
        return tuple(found)

    def _cross_products(self, supervised: float, features: float, sequences: int) -> list[Product]:
        """Those of align and of cross-attention."""
        width, layers, found = self.hidden_size, self.num_layers, []
        once = layers * supervised * width
        for number, (inputs, outputs) in enumerate(self.align_sizes):
            inner = features * inputs if number else 0.0
            found.append(
                Product(features, inputs, outputs, kept=features * inputs, activated=inner, split=number % 2 == 1)
            )
        found.append(Product(features, width, 2 * layers * width, kept=(2 + 2 * layers) * features * width))
        found.append(Product(supervised, width, layers * width, kept=3 * once))
        found.append(Product(supervised * features / max(1, sequences), width, 2 * layers))
        found.append(Product(supervised, width, layers * width, kept=once, split=True))
        return found


def from_hf(config: dict[str, Any]) -> PostBlockSpec:
    """PostBlockSpec of the config.json beside the weights, whose key `interaction` is the block of a model.json."""
    return load_config(PostBlockSpec, config["interaction"], what="interaction in config.json")


def with_form(source: PartSource) -> dict[str, Any]:
    """The config.json beside a block with the key `interaction`. The original's does not say which of its forms the
    block has; its tensors do.

    Raises WeightError where sizes are missing, or another function is asked for.
    """
    config = source.config or {}
    if "interaction" in config:
        return config
    missing = [key for key in ("mm_hidden_size", "hidden_size", "intermediate_size") if key not in config]
    if missing:
        raise WeightError(
            f"config.json of a model with a post-interaction block lacks {', '.join(missing)}; expected the config of "
            "the model that the block was trained in. Copy it beside the weights"
        )
    function = config.get("align_hidden_act", "gelu")
    if function != "gelu":
        raise WeightError(
            f'config.json: found align_hidden_act "{function}"; expected "gelu", the one that the block\'s align has '
            "here. Weights that were trained with another function cannot be used"
        )
    names = source.names
    first = next((name for name in ("align.weight", "align.fc1.weight") if name in names), None)
    width = config["mm_hidden_size"] if first is None else source.shape(first)[1]
    layers = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    block = {
        "features": "vision_projector" if width == config["hidden_size"] != config["mm_hidden_size"] else None,
        "align": "linear" if first == "align.weight" else None,
        "cross_attention": any(".cross_attn." in name for name in names),
        "self_attention": any(".self_attn." in name for name in names),
        "doubled_residual": True,
        "num_layers": len(layers) or 1,
        "input_size": width,
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config.get("num_attention_heads", 32),
        "layernorm_epsilon": config.get("layer_norm_eps", 1e-5),
        "activation_func": config.get("hidden_act", "silu"),
    }
    return config | {"interaction": {key: value for key, value in block.items() if value is not None}}


_LAYER = "blocks.layers.{}."


def _norm(ours: str, theirs: str, needs: str | None = None) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",), needs=needs) for kind in ("weight", "bias"))


def _projections(ours: str, theirs: str, needs: str) -> list[Rule]:
    names = (("q", "q", 0), ("k", "k", 0), ("v", "v", 0), ("proj", "out", 1))
    return [
        Rule(f"{ours}{own}.weight", (f"{theirs}{name}_proj.weight",), axis=axis, needs=needs)
        for own, name, axis in names
    ]


def _rules() -> RuleSet:
    """The original's names."""
    theirs = "blocks.{}."
    fc1, fc2 = ("align.linear_fc1", "align.fc1"), ("align.linear_fc2", "align.fc2")
    attention = [
        rule
        for kind, needs in (("cross", "cross"), ("self", "of_text"))
        for rule in (
            *_norm(f"{_LAYER}{kind}_attention.norm", theirs + "layer_norm1", needs),
            *_projections(f"{_LAYER}{kind}_attention.linear_", f"{theirs}{kind}_attn.", needs),
            *_norm(_LAYER + "mlp.norm", theirs + "layer_norm2", needs),
        )
    ]
    return RuleSet(
        (
            Rule(f"{fc1[0]}.weight", (f"{fc1[1]}.weight",), axis=0, needs="align_mlp"),
            Rule(f"{fc1[0]}.bias", (f"{fc1[1]}.bias",), axis=0, needs="align_mlp"),
            Rule(f"{fc2[0]}.weight", (f"{fc2[1]}.weight",), axis=1, needs="align_mlp"),
            Rule(f"{fc2[0]}.bias", (f"{fc2[1]}.bias",), needs="align_mlp"),
            Rule("align.linear_fc1.weight", ("align.weight",), axis=0, needs="align_linear"),
            Rule("align.linear_fc1.bias", ("align.bias",), axis=0, needs="align_linear"),
            *_norm("memory_norm", "image_norm", "cross"),
            *attention,
            *_norm(_LAYER + "mlp.norm", theirs + "layer_norm1", "mlp_alone"),  # the only one there
            Rule(_LAYER + "mlp.linear_fc1.weight", (theirs + "mlp.fc1.weight",), axis=0),
            Rule(_LAYER + "mlp.linear_fc2.weight", (theirs + "mlp.fc2.weight",), axis=1),
            # The original builds and stores them in the forms that never look at an image, too.
            Drop("align.*"),
            Drop("image_norm.*"),
        )
    )


POST_BLOCK_RULES = _rules()


def shapes(spec: PostBlockSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, inner, result = spec.hidden_size, spec.ffn_hidden_size, {}
    for number, (inputs, outputs) in enumerate(spec.align_sizes, start=1):
        result |= {f"align.linear_fc{number}.weight": (outputs, inputs), f"align.linear_fc{number}.bias": (outputs,)}
    norms = [_LAYER + "mlp.norm"]
    norms += ["memory_norm"] if spec.cross_attention else []
    for kind, there in (("cross", spec.cross_attention), ("self", spec.self_attention)):
        if there:
            owner = f"{_LAYER}{kind}_attention."
            norms.append(owner + "norm")
            result |= {f"{owner}linear_{name}.weight": (width, width) for name in ("q", "k", "v", "proj")}
    for norm in norms:
        result |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    mlp = {_LAYER + "mlp.linear_fc1.weight": (inner, width), _LAYER + "mlp.linear_fc2.weight": (width, inner)}
    return result | mlp


def build(spec: PostBlockSpec, runtime):
    """The block."""
    from mindspeed_mm.models.kit.post_block import PostBlock

    return PostBlock(spec, runtime)


BLOCK_ONLY = Layout(
    "post-block",
    (r"^(base_model\.model\.)?(model\.)?(post_interaction_block|post_decoder)\.",),
    tuple(
        Prefix(outer + name, INTERACTION)
        for outer in ("", "model.")
        for name in ("post_interaction_block.", "post_decoder.")
    ),
    {INTERACTION: "llava"},
    {INTERACTION: "post_interaction_block."},
)
"""The block's tensors alone, as they stand beside those of a LLaVA."""


PART = Part(
    name="post_block",
    kind=INTERACTION,
    Spec=PostBlockSpec,
    from_hf=from_hf,
    with_form=with_form,
    layouts=(BLOCK_ONLY,),
    rules={"llava": POST_BLOCK_RULES, "ours": POST_BLOCK_RULES.own()},
    shapes=shapes,
    build=build,
    checked=("num_layers", "input_size", "hidden_size", "cross_attention", "self_attention", "align"),
)
