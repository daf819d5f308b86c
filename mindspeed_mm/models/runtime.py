"""How a model is spread and in which precision it runs: what a spec (the architecture) does not say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Parallel layout and precision, stated once by the launcher."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP (clip/model.py, QuickGELU)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": quick_gelu}


def transformer_config(spec, runtime: Runtime, *, num_layers: int, pipelined: bool, **overrides) -> TransformerConfig:
    """TransformerConfig of a part.

    Args:
        spec: the part's spec; its field names are those of TransformerConfig.
        num_layers: layers that exist (a tower builds fewer than its source has).
        pipelined: True where the layers are spread over the pipeline stages, False where one stage holds the part.
        overrides: fields that the part sets itself.
    """
    fields = {
        "num_layers": num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "add_bias_linear": spec.add_bias_linear,
        "gated_linear_unit": spec.gated_linear_unit,
        "activation_func": ACTIVATIONS[spec.activation_func],
        "attention_dropout": spec.attention_dropout,
        "hidden_dropout": spec.hidden_dropout,
        "init_method_std": spec.init_method_std,
        "recompute_granularity": spec.recompute_granularity,
        "recompute_method": spec.recompute_method,
        "recompute_num_layers": spec.recompute_num_layers,
        "tensor_model_parallel_size": runtime.tensor_model_parallel_size,
        "pipeline_model_parallel_size": runtime.pipeline_model_parallel_size if pipelined else 1,
        "context_parallel_size": runtime.context_parallel_size,
        "sequence_parallel": runtime.sequence_parallel,
        "params_dtype": runtime.params_dtype,
        "pipeline_dtype": runtime.params_dtype,
        "bf16": runtime.params_dtype == torch.bfloat16,
        "fp16": runtime.params_dtype == torch.float16,
        # The loss of a step is a sum over its supervised tokens, divided once by their global number.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": runtime.pipeline_model_parallel_size > 1,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**(fields | overrides))


def attention_fields(spec) -> dict:
    """Fields of a part that has transformer layers (the projector has none)."""
    return {
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "add_qkv_bias": spec.add_qkv_bias,
        "normalization": spec.normalization,
        "layernorm_epsilon": spec.layernorm_epsilon,
    }
