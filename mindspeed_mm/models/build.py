"""Builds a VLM on this rank and fills it from its specs' ckpt_path."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mindspeed_mm.models.adapters.base_hash import check_base
from mindspeed_mm.models.adapters.loaded import pairs_of
from mindspeed_mm.models.adapters.lora import attach_lora
from mindspeed_mm.models.adapters.peft_format import read_peft
from mindspeed_mm.models.adapters.quantized_base import StoredWeight, loading_state, mark_split, store_linears
from mindspeed_mm.models.adapters.saved_values import attach_saved, forget_base
from mindspeed_mm.models.hidden_matrices import mark_matrices
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.trainable import mark
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform.core_versions import known_options
from mindspeed_mm.weights.loading import LoadReport, check_finite, load_part
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
    switchable: bool = False,
) -> tuple[VLM, list[LoadReport]]:
    """Build this pipeline stage's part of the model in `runtime.params_dtype` on `device`.

    Args:
        vp_stage: which of this stage's chunks, where it has several.
        load_weights: fill each part from its ckpt_path, strictly; False where a training checkpoint follows.
        sources: opened sources by part kind, instead of the specs' ckpt_path.
        allow_nonfinite: load weights with NaN or Inf, which are else refused.
        switchable: keep the base's values of whole tensors that come with an adapter, for `adapters_off`.

    Returns:
        The model and one report for each part that was loaded or declared fresh.

    Raises:
        WeightError: weights are missing, damaged or of another geometry; a part is neither loaded nor declared fresh.
    """
    vlm = VLM(spec, runtime, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    vlm = vlm.to(dtype=runtime.params_dtype)
    opened = opened_sources(spec, sources or {}) if load_weights else {}
    stored = {}
    for kind, module in vlm.parts().items():
        if spec.part(kind).quantize is None:
            module.to(device)
        else:  # weights in 4 or 8 bits are never whole on the device
            stored[kind] = _stored(module, spec, kind, runtime, keep=load_weights and kind not in opened)
    reports = _load(vlm, spec, runtime, opened, stored, allow_nonfinite=allow_nonfinite) if load_weights else []
    attach_adapters(vlm, spec, runtime, opened, load_weights=load_weights, allow_nonfinite=allow_nonfinite)
    vlm = vlm.to(device)
    if not switchable:
        forget_base(vlm)
    for kind, module in vlm.parts().items():
        offset = _place(module, runtime, kind).get("layer_offset", 0)
        mark(module, spec.part(kind), offset)
        mark_matrices(module, spec.parts()[kind], spec.part(kind), offset)
    return vlm, reports


def opened_sources(spec: ModelSpec, given: dict[str, Source]) -> dict[str, Source]:
    """The weights of each part that has some: those that are given, else what its ckpt_path names."""
    paths = {kind: part.ckpt_path for kind, part in spec.part_specs().items() if kind not in given and part.ckpt_path}
    opened = {path: open_source(path, adapters=spec.adapter_files) for path in dict.fromkeys(paths.values())}
    return given | {kind: opened[path] for kind, path in paths.items()}


def _stored(
    module: torch.nn.Module, spec: ModelSpec, kind: str, runtime: Runtime, *, keep: bool
) -> dict[str, StoredWeight]:
    """Turn the linears of a part into stored ones, of their present values or of none; returns the places of their
    weights."""
    part, part_spec = spec.parts()[kind], spec.part(kind)
    offset = _place(module, runtime, kind).get("layer_offset", 0)
    mark_split(module, part, part_spec, offset)
    return store_linears(module, part, part_spec, offset, keep=keep)


def _load(
    vlm: VLM,
    spec: ModelSpec,
    runtime: Runtime,
    sources: dict[str, Source],
    stored: dict[str, dict[str, StoredWeight]],
    *,
    allow_nonfinite: bool,
) -> list[LoadReport]:
    reports = []
    for kind, module in vlm.parts().items():
        part_spec, source = spec.part(kind), sources.get(kind)
        reports.append(
            load_part(
                loading_state(module, stored[kind]) if kind in stored and source is not None else module,
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


def attach_adapters(
    vlm: VLM,
    spec: ModelSpec,
    runtime: Runtime,
    sources: dict[str, Source],
    *,
    load_weights: bool,
    allow_nonfinite: bool = False,
) -> None:
    """Give the parts whose spec says lora their adapters, and all parts the whole tensors that come with these.

    Raises:
        WeightError: the adapter is damaged, or was trained on other weights than those of `sources`.
        ConfigError: as attach_lora and attach_saved.
    """
    tp = {"tp_rank": parallel_state.get_tensor_model_parallel_rank(), "tp_size": runtime.tensor_model_parallel_size}
    for kind, module in vlm.parts().items():
        part, part_spec = spec.parts()[kind], spec.part(kind)
        if part_spec.lora is None:
            continue
        if part_spec.lora.load and kind in sources:
            check_base(Path(part_spec.lora.load), kind, part, part_spec, sources[kind])
        pairs = pairs_of(spec, kind) if load_weights else None
        for name, pair in (pairs or {}).items():
            for tensor in filter(lambda each: each is not None, pair):
                check_finite(tensor, f"{part_spec.lora.load}: the adapter of {name}", allowed=allow_nonfinite)
        offset = _place(module, runtime, kind).get("layer_offset", 0)
        attach_lora(module, part, part_spec, layer_offset=offset, pairs=pairs, **tp)
    for folder in _loaded_folders(spec) if load_weights else ():
        adapter = read_peft(folder)
        saved = adapter.saved_tensors(spec.parts(), spec.part_specs(), spec.family.layouts)
        for kind, module in vlm.parts().items():
            if kind in saved:
                offset = _place(module, runtime, kind).get("layer_offset", 0)
                place = tp | {"layer_offset": offset, "allow_nonfinite": allow_nonfinite}
                known = spec.parts()[kind], spec.part(kind)
                attach_saved(module, *known, adapter, saved[kind], sources.get(kind), **place)


def _loaded_folders(spec: ModelSpec) -> list[str]:
    """What the lora blocks of a model name to load, each once."""
    loads = [part.lora.load for part in spec.part_specs().values() if part.lora is not None]
    return [load for load in dict.fromkeys(loads) if load is not None]


def _place(module: torch.nn.Module, runtime: Runtime, kind: str) -> dict[str, int]:
    """Which layers of the text decoder this pipeline stage holds, for `load_part`; nothing where it holds all."""
    if kind != "text_decoder" or runtime.pipeline_model_parallel_size == 1:
        return {}
    stage = known_options(get_transformer_layer_offset, vp_stage=module.vp_stage)
    return {
        "layer_offset": get_transformer_layer_offset(module.config, **stage),
        "num_local_layers": len(module.decoder.layers),
    }
