"""How a model is spread and in which precision it runs: what a spec (the architecture) does not say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from mindspeed_mm.models.part import flat_layers
from mindspeed_mm.platform.core_versions import known_options


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Parallel layout and precision, stated once by the launcher."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers on each stage (interleaved schedule); None: one."""
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones counted each."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    @property
    def sequence_multiple(self) -> int:
        """Rows must be as long as a multiple of this, so that every rank gets an equal slice."""
        return self.context_parallel_size * (self.tensor_model_parallel_size if self.sequence_parallel else 1)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP (clip/model.py, QuickGELU)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016), HF's gelu_pytorch_tanh."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (So et al. 2021), HF's relu2."""
    return F.relu(x).square()


ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    # Other names of these in transformers, whose formulas are the same.
    "swish": F.silu,
    "gelu_python": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), gelu_tanh),
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu2": squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""By transformers' names."""


def transformer_config(spec, runtime: Runtime, *, num_layers: int, pipelined: bool, **overrides) -> TransformerConfig:
    """TransformerConfig of a part.

    Args:
        spec: the part's spec; its field names are those of TransformerConfig.
        num_layers: layers that exist (a vision encoder builds fewer than its source has).
        pipelined: True where the layers are spread over the pipeline stages, False where one stage holds the part.
        overrides: fields that the part sets itself.
    """
    interleaved = runtime.virtual_pipeline_model_parallel_size is not None
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
        "virtual_pipeline_model_parallel_size": runtime.virtual_pipeline_model_parallel_size if pipelined else None,
        # Whatever stands on the first stage alone sees whole images on every rank.
        "context_parallel_size": runtime.context_parallel_size if pipelined else 1,
        "sequence_parallel": runtime.sequence_parallel,
        "params_dtype": runtime.params_dtype,
        "pipeline_dtype": runtime.params_dtype,
        "bf16": runtime.params_dtype == torch.bfloat16,
        "fp16": runtime.params_dtype == torch.float16,
        # The loss of a step is a sum over its supervised tokens, divided once by their global number.
        "calculate_per_token_loss": True,
        # Stages tell each other the length of a micro-batch. With virtual stages, messages of both directions are under
        # way at once (which two stages need) and could take each other's lengths: there, all are equally long.
        "variable_seq_lengths": runtime.pipeline_model_parallel_size > 1 and not interleaved,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # There are no experts; megatron.core 0.16 refuses variable lengths beside the default dispatcher.
        "moe_token_dispatcher_type": "alltoall",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        # Weights that are stored in fewer bits are read tensor by tensor: nothing is made of them before, and their
        # part is put together in host memory.
        "use_cpu_initialization": spec.quantize is not None,
        "perform_initialization": spec.quantize is None or spec.fresh or bool(spec.fresh_names),
    }
    layout = _stages(spec, runtime) if pipelined else None
    fields |= known_options(TransformerConfig, pipeline_model_parallel_layout=layout)
    return TransformerConfig(**(fields | overrides))


def _stages(spec, runtime: Runtime) -> list[list[str]] | None:
    """The spec's uneven split in the words of megatron.core: what stands on each stage; None for equal shares."""
    if runtime.pipeline_model_parallel_size == 1 or spec.pipeline_num_layers is None:
        return None
    stages = [["decoder"] * layers for layers in flat_layers(spec.pipeline_num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def encoder_config(spec, runtime: Runtime, *, num_layers: int | None = None, **overrides) -> TransformerConfig:
    """TransformerConfig of a part with attention that one stage holds; `num_layers` (default: the spec's) and
    `overrides` as in `transformer_config`."""
    return transformer_config(
        spec,
        runtime,
        num_layers=spec.num_layers if num_layers is None else num_layers,
        pipelined=False,
        sequence_parallel=False,
        **attention_fields(spec),
        **overrides,
    )


def linears_config(spec, runtime: Runtime, *, num_layers: int) -> TransformerConfig:
    """TransformerConfig of a part of linears alone that one stage holds."""
    return transformer_config(
        spec,
        runtime,
        num_layers=num_layers,
        pipelined=False,
        sequence_parallel=False,
        # There is no attention; megatron.core wants a number that the ranks can share.
        num_attention_heads=runtime.tensor_model_parallel_size,
    )


def attention_fields(spec) -> dict:
    """Fields of a part that has transformer layers (the projector has none)."""
    return {
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "add_qkv_bias": spec.add_qkv_bias,
        "normalization": spec.normalization,
        "layernorm_epsilon": spec.layernorm_epsilon,
    }
