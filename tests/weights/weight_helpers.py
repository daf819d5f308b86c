"""Small random checkpoints and empty module states, made without the code under test where that matters."""

import torch

from mindspeed_mm.weights.shards import shard


def random_hf_state(spec, dtype=torch.float32, seed=0):
    """Random tensors of a Llama under HF names, made from shapes alone."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, channels = spec.hidden_size, spec.ffn_hidden_size, spec.kv_channels
    shapes = {"model.embed_tokens.weight": (spec.language_vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not spec.share_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (spec.language_vocab_size, hidden)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "self_attn.q_proj.weight"] = (spec.num_attention_heads * channels, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (spec.num_query_groups * channels, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (spec.num_query_groups * channels, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, spec.num_attention_heads * channels)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def empty_state(part, spec, source, *, tp_size=1):
    """NaN tensors of the shapes that a module has on one tensor-parallel rank."""
    geometry = spec.geometry
    result = {}
    for step in part.rules[source.dialect].match(source.names, geometry).steps:
        if not step.unused:
            full = step.rule.to_ours([source.get(name) for name in step.sources], geometry)
            result[step.target] = torch.full_like(shard(full, step.rule, 0, tp_size, geometry), float("nan")).float()
    return result


class CallsCode:
    """An object whose pickle calls `eval` when it is read."""

    def __reduce__(self):
        return eval, ("1 + 1",)
