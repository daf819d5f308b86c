"""InternLM2 decoder: Llama under names of its own, with queries, keys and values of each group in one tensor.

transformers has no class for it (its repositories bring their code, which is never run here).
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.decoder_rules import ATTENTION, CHECKED, LAYER, TIED, build_decoder, shapes
from mindspeed_mm.models.kit.decoder_spec import DecoderSpec
from mindspeed_mm.models.kit.hf_config import HfFormat
from mindspeed_mm.models.part import Part
from mindspeed_mm.weights.rules import QKV, Drop, GateUp, Geometry, Rule, RuleSet, Vocab


class InternLM2Spec(DecoderSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["internlm2"] = "internlm2"


FORMAT = HfFormat(
    InternLM2Spec,
    ("internlm2",),
    "InternLM2ForCausalLM",
    defaults={"vocab_size": 103168, "bias": True},
)


def from_hf(config: dict[str, Any]) -> InternLM2Spec:
    """InternLM2Spec of an InternLM2 config.json. Raises ConfigError for what we do not build."""
    full = FORMAT.fill(config)
    if full["bias"]:
        raise ConfigError(f"{FORMAT.name}: found bias true; InternLM2 without biases is supported, as released.")
    return FORMAT.spec_of(full)


def to_hf(spec: InternLM2Spec, dtype: str) -> dict[str, Any]:
    """config.json as InternLM2's own code reads it."""
    written = FORMAT.write(spec, dtype, bias=False)
    written["auto_map"] = {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    }
    if spec.rope_scaling is not None:
        written["rope_scaling"]["type"] = written["rope_scaling"].pop("rope_type")
    return written


@dataclass(frozen=True)
class GroupedQKV(QKV):
    """One source tensor that is merged group by group, as ours is."""

    def to_ours(self, tensors: list[Tensor], geometry: Geometry) -> Tensor:
        return tensors[0]

    def to_theirs(self, tensor: Tensor, geometry: Geometry) -> list[Tensor]:
        return [tensor]


_LAYER = "model.layers.{}."

HF_RULES = RuleSet(
    (
        Vocab("embedding.word_embeddings.weight", ("model.tok_embeddings.weight",), axis=0),
        Rule(LAYER + "input_layernorm.weight", (_LAYER + "attention_norm.weight",)),
        GroupedQKV(ATTENTION + "linear_qkv.weight", (_LAYER + "attention.wqkv.weight",), axis=0),
        Rule(ATTENTION + "linear_proj.weight", (_LAYER + "attention.wo.weight",), axis=1),
        Rule(LAYER + "pre_mlp_layernorm.weight", (_LAYER + "ffn_norm.weight",)),
        GateUp(
            LAYER + "mlp.linear_fc1.weight",
            (_LAYER + "feed_forward.w1.weight", _LAYER + "feed_forward.w3.weight"),
            axis=0,
        ),
        Rule(LAYER + "mlp.linear_fc2.weight", (_LAYER + "feed_forward.w2.weight",), axis=1),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Vocab("output_layer.weight", ("output.weight",), axis=0),
        Drop(_LAYER + "attention.rotary_emb.inv_freq"),
    ),
    tied=TIED,
)

PART = Part(
    name="internlm2",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=InternLM2Spec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
