"""Builds a VLM on this rank and fills it from its specs' ckpt_path."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mindspeed_mm.models.adapters.lora import attach_lora
from mindspeed_mm.models.adapters.peft_format import pairs_of
from mindspeed_mm.models.adapters.quantized_base import quantize_linears
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.trainable import mark
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform.core_versions import known_options
from mindspeed_mm.weights.loading import LoadReport, load_part
from mindspeed_mm.weights.sources import Source


def build_vlm(
    spec: ModelSpec,
    runtime: Runtime,
    device: torch.device,
    *,
    load_weights: bool = True,
    sources: dict[str, Source] | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    allow_nonfinite: bool = False,
) -> tuple[VLM, list[LoadReport]]:
    """Build this pipeline stage's part of the model in `runtime.params_dtype` on `device`.

    Args:
        vp_stage: which of this stage's chunks, where it has several.
        load_weights: fill each part from its ckpt_path, strictly; False where a training checkpoint follows.
        sources: opened sources by part kind, instead of the specs' ckpt_path.
        allow_nonfinite: load weights with NaN or Inf, which are else refused.

    Returns:
        The model and one report for each part that was loaded or declared fresh.

    Raises:
        WeightError: weights are missing, damaged or of another geometry; a part is neither loaded nor declared fresh.
    """
    vlm = VLM(spec, runtime, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    # Weights in 4 or 8 bits are never whole on the device.
    stored = any(part.quantize for part in spec.part_specs().values())
    vlm = vlm.to("cpu" if stored else device, runtime.params_dtype)
    reports = _load(vlm, spec, runtime, sources, allow_nonfinite=allow_nonfinite) if load_weights else []
    for kind, module in vlm.parts().items():
        if spec.part(kind).quantize is not None:
            offset = _place(module, runtime, kind).get("layer_offset", 0)
            quantize_linears(module, spec.parts()[kind], spec.part(kind), offset)
    _attach_adapters(vlm, spec, runtime, load_weights=load_weights)
    vlm = vlm.to(device)
    for kind, module in vlm.parts().items():
        mark(module, spec.part(kind), _place(module, runtime, kind).get("layer_offset", 0))
    return vlm, reports


def _load(
    vlm: VLM, spec: ModelSpec, runtime: Runtime, sources: dict[str, Source] | None, *, allow_nonfinite: bool
) -> list[LoadReport]:
    reports = []
    opened: dict[str, Source] = {}
    for kind, module in vlm.parts().items():
        part_spec = spec.part_specs()[kind]
        source = (sources or {}).get(kind)
        if source is None and part_spec.ckpt_path is not None:
            source = opened.setdefault(part_spec.ckpt_path, open_source(part_spec.ckpt_path))
        reports.append(
            load_part(
                module,
                spec.parts()[kind],
                part_spec,
                source,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                tp_size=runtime.tensor_model_parallel_size,
                allow_nonfinite=allow_nonfinite,
                **_place(module, runtime, kind),
            )
        )
    return reports


def _attach_adapters(vlm: VLM, spec: ModelSpec, runtime: Runtime, *, load_weights: bool) -> None:
    """Give the parts whose spec says lora their adapters."""
    for kind, module in vlm.parts().items():
        part_spec = spec.part_specs()[kind]
        if part_spec.lora is not None:
            attach_lora(
                module,
                spec.parts()[kind],
                part_spec,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                tp_size=runtime.tensor_model_parallel_size,
                layer_offset=_place(module, runtime, kind).get("layer_offset", 0),
                pairs=pairs_of(spec, kind) if load_weights else None,
            )


def _place(module: torch.nn.Module, runtime: Runtime, kind: str) -> dict[str, int]:
    """Which layers of the text decoder this pipeline stage holds, for `load_part`; nothing where it holds all."""
    if kind != "text_decoder" or runtime.pipeline_model_parallel_size == 1:
        return {}
    stage = known_options(get_transformer_layer_offset, vp_stage=module.vp_stage)
    return {
        "layer_offset": get_transformer_layer_offset(module.config, **stage),
        "num_local_layers": len(module.decoder.layers),
    }
