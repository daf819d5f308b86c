"""Weight rules of gated cross-attention, in the names of OpenFlamingo and of Otter.

Both name a decoder's own layers `...layers.N.decoder_layer` and keep the cross-attention beside them.
"""

from __future__ import annotations

from dataclasses import replace

from mindspeed_mm.models.kit.decoder_rules import LAYER
from mindspeed_mm.weights.rules import Drop, Halves, Rule, RuleSet

CROSS = LAYER + "gated_cross."


def with_cross_attention(rules: RuleSet, layer: str, *, every: int, mlp: str) -> RuleSet:
    """The rules of a decoder with gated cross-attention.

    Args:
        rules: those of the decoder alone.
        layer: what stands before the names of its layers there, such as "model.layers.{}.".
        every: the layer in front of every how many decoder layers.
        mlp: what the MLP's norm and linears stand under, "ff." in OpenFlamingo, "feed_forward." in Otter.
    """
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
        replace(
            rule,
            sources=tuple(name.replace(layer, layer + "decoder_layer.") for name in rule.sources),
        )
        if isinstance(rule, Rule)
        else rule
        for rule in rules.rules
    ]
    crossing = [
        (Halves if ours.startswith("linear_kv") else Rule)(
            CROSS + ours, (theirs + name,), axes.get(ours), layer_stride=(every - 1, every)
        )
        for ours, name in names.items()
    ]
    # open_flamingo's state dicts hold everything a second time under these.
    drops = [Drop("old_decoder_blocks.*"), Drop("gated_cross_attn_layers.*")]
    return RuleSet((*own, *crossing, *drops), rules.tied)
