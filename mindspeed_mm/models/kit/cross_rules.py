"""Weight rules of gated cross-attention, in the names of OpenFlamingo and of Otter.

Both name a decoder's own layers `...layers.N.decoder_layer` and keep the cross-attention beside them.
"""

from __future__ import annotations

from dataclasses import replace

from mindspeed_mm.models.kit.cross_spec import CROSS, FLAMINGO, OTTER
from mindspeed_mm.weights.rules import Drop, Halves, Rule, RuleSet


def cross_rules(rules: RuleSet, layer: str) -> dict[str, RuleSet]:
    """The rules of a decoder that may have gated cross-attention, by dialect: its own, ours and those of both projects.

    Args:
        rules: those of the decoder alone.
        layer: what stands before the names of its layers there, such as "model.layers.{}.".
    """
    otter = _with_cross_attention(rules, layer, mlp="feed_forward.")
    return {
        "hf": rules,
        FLAMINGO: _with_cross_attention(rules, layer, mlp="ff."),
        OTTER: otter,
        "ours": otter.own(),
    }


def _with_cross_attention(rules: RuleSet, layer: str, *, mlp: str) -> RuleSet:
    """`mlp`: what the names of the MLP's norm and linears begin with."""
    theirs = layer + "gated_cross_attn_layer."
    names = {
        "attention_norm.weight": "attn.norm.weight",
        "attention_norm.bias": "attn.norm.bias",
        "linear_q.weight": "attn.to_q.weight",
        "linear_kv.weight": "attn.to_kv.weight",
        "linear_proj.weight": "attn.to_out.weight",
        "attention_gate": "attn_gate",
        "mlp.norm.weight": mlp + "0.weight",
        "mlp.norm.bias": mlp + "0.bias",
        "mlp.linear_fc1.weight": mlp + "1.weight",
        "mlp.linear_fc2.weight": mlp + "3.weight",
        "mlp_gate": "ff_gate",
    }
    axes = {"linear_q.weight": 0, "linear_kv.weight": 0, "linear_proj.weight": 1}
    axes |= {"mlp.linear_fc1.weight": 0, "mlp.linear_fc2.weight": 1}
    own = [
        replace(rule, sources=tuple(own_name(name, layer) for name in rule.sources)) if isinstance(rule, Rule) else rule
        for rule in rules.rules
    ]
    where = {"needs": "cross_stride", "layer_stride": "cross_stride"}
    crossing = [
        (Halves if ours.startswith("linear_kv") else Rule)(CROSS + ours, (theirs + name,), axes.get(ours), **where)
        for ours, name in names.items()
    ]
    # open_flamingo's state dicts hold everything a second time under these.
    drops = [Drop("old_decoder_blocks.*"), Drop("gated_cross_attn_layers.*")]
    return RuleSet((*own, *crossing, *drops), rules.tied)


def own_name(name: str, layer: str) -> str:
    """A name of the decoder alone as it stands beside cross-attention; `{}` of both is the layer number."""
    return name.replace(layer, layer + "decoder_layer.")
