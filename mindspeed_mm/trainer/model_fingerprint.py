"""One name for a model's weights at every layout: sums that do not care how the weights are spread."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mindspeed_mm.models.adapters.lora import LoraPair
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform.core_versions import known_options
from mindspeed_mm.weights.loading import global_name

NOT_WEIGHTS = {"freeze", "ckpt_path", "fresh", "params_dtype", "bf16", "fp16", "pipeline_num_layers", "lora"}
"""Keys of a spec on which the outputs of given weights do not depend (besides recompute_*)."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(
    spec: ModelSpec, modules: Iterable[VLM], dtype: torch.dtype, device: torch.device, *, adapters: bool
) -> str:
    """Hexadecimal digest of a model that is spread over the ranks; equal on all of them. Collective.

    A tensor counts by its name and the sum of its bits, to which each rank adds its share. Reads all weights once.

    Args:
        modules: this rank's chunks.
        adapters: whether adapters count; without, it is the model with them switched off.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for module in modules:
        total += _bits(module, adapters)
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    facts = {"spec": _architecture(spec.model_dump(mode="json")), "dtype": str(dtype), "weights": total.item()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _bits(module: VLM, adapters: bool) -> torch.Tensor:
    pairs = [pair for pair in module.modules() if isinstance(pair, LoraPair)] if not adapters else []
    left_out = {id(tensor) for pair in pairs for tensor in pair.parameters()}
    stage = known_options(get_transformer_layer_offset, vp_stage=module.vp_stage)
    offset = get_transformer_layer_offset(module.text_decoder.config, **stage)
    tied = module.share_embeddings_and_output_weights and not module.pre_process
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    total: Any = 0
    for name, tensor in module.named_parameters():
        counted = first or getattr(tensor, "tensor_model_parallel", False)
        if id(tensor) in left_out or not counted or (tied and name.endswith("output_layer.weight")):
            continue
        part, _, inner = name.partition(".")
        if part == "text_decoder":
            name = f"{part}.{global_name(inner, offset)}"
        bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        total = total + bits * (2 * zlib.crc32(name.encode()) + 1)
    return total


def _architecture(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _architecture(value) if isinstance(value, dict) else value
        for key, value in spec.items()
        if key not in NOT_WEIGHTS and not key.startswith("recompute_")
    }
