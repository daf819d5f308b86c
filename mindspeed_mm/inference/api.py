"""`mm.load`: any readable weights -> a model that gives logits, features and text."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoint_converters.convert import convert
from mindspeed_mm.data.media import MediaProcessor
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.defaults import ModelDefaults
from mindspeed_mm.inference.locate import Located, locate
from mindspeed_mm.models.adapters.loaded import own_adapters, with_adapter
from mindspeed_mm.models.headers import check_weights
from mindspeed_mm.models.part import DTYPES
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.platform import Platform, get_platform
from mindspeed_mm.platform.distributed import init_single_process, meet
from mindspeed_mm.weights.blockwise import KINDS
from mindspeed_mm.weights.sources import errors_name

if TYPE_CHECKING:
    from mindspeed_mm.inference.loaded import LoadedVLM

__all__ = ["convert", "load"]

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    image_processor: str | Path | None = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    quantize: str | None = None,
    double_quant: bool = False,
    adapter: str | Path | None = None,
    allow_nonfinite: bool = False,
) -> LoadedVLM:
    """Load a whole model for inference.

    Args:
        path: a folder in llava-hf or liuhaotian layout, a folder of converted files with their model.json, a training
            checkpoint (the save folder or one iteration), or a model.json whose ckpt_path entries name the weights.
        device: "npu", "cuda", "cpu"; None: the first that is there.
        dtype: "fp32", "bf16", "fp16" or a torch dtype; None: fp32 on the CPU, else what the weights are stored in.
        tokenizer, image_processor: folders that override what comes with the weights.
        tensor_model_parallel_size, pipeline_model_parallel_size: spread the model over the processes of a torchrun
            launch, which must be as many as their product; every process then makes the same calls and gets the same
            answers. `logits`, `answer_losses`, `vision_features` and `project` need the whole model on each stage.
        quantize: "int8", "nf4" or "fp4": keep the linears of the decoder's layers in 8 or 4 bits, each rank its own.
        double_quant: beside `quantize`: keep their scales in 8 bits, too.
        adapter: a LoRA adapter's folder in PEFT's format, made for this model. It is switched on;
            `vlm.disable_adapter()` is a context in which it is off.
        allow_nonfinite: load weights with NaN or Inf, which are else refused.

    Raises:
        WeightError: the path holds no whole model, or a damaged one; the adapter is damaged or another model's.
        ConfigError: the model's spec is missing or wrong; unknown device or dtype; another number of processes.
    """
    located = locate(Path(path), tokenizer=tokenizer, image_processor=image_processor)
    return load_located(
        located,
        device=device,
        dtype=dtype,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        quantize=quantize,
        double_quant=double_quant,
        adapter=adapter,
        allow_nonfinite=allow_nonfinite,
    )


def load_located(
    located: Located,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    quantize: str | None = None,
    double_quant: bool = False,
    adapter: str | Path | None = None,
    allow_nonfinite: bool = False,
) -> LoadedVLM:
    """Load a model whose parts were found, as `load` says."""
    dtype = _dtype(dtype)
    spec = own_adapters(located.spec, merged=located.sources is not None)
    spec = spec if adapter is None else with_adapter(spec, adapter)
    spec = _quantized(spec, quantize, double_quant=double_quant)
    words = load_tokenizer(located.tokenizer) if located.tokenizer else None
    if words is not None and located.generation is not None:
        words.take_generation(located.generation)
    if words is not None:
        spec.family.check_tokens(spec, words.token_to_id)
        ModelDefaults(words.generation.options, words.generation.where)  # a wrong value is told before weights are read
    if not located.placeholder_ids and words is not None:  # our own layouts, whose files hold no ids of HF's keys
        located = _with_token_ids(located, located.spec.family.token_ids(words.token_to_id))
    media = _media_of(located)
    if located.sources is None:
        check_weights(spec)  # they may not be those of the model config
    platform = get_platform(device)
    # Modules below import megatron.core, which the platform has just prepared.
    from megatron.core import parallel_state

    from mindspeed_mm.inference.loaded import LoadedVLM
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.weights.loading import table

    _join_ranks(platform, tensor_model_parallel_size, pipeline_model_parallel_size)
    if dtype is None:
        dtype = torch.float32 if platform.name == "cpu" else located.spec.text_decoder.dtype or torch.bfloat16
    runtime = Runtime(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        params_dtype=dtype,
    )
    vlm, reports = build_vlm(
        spec,
        runtime,
        platform.device(),
        sources=located.sources,
        allow_nonfinite=allow_nonfinite,
        switchable=True,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    logger.info("weights of %s:\n%s", located.path, table(reports))
    return LoadedVLM(vlm, located, words, media)


def _quantized(spec: ModelSpec, kind: str | None, *, double_quant: bool) -> ModelSpec:
    """The spec with its decoder's linears in `kind`; as it is where that is None."""
    if kind is None:
        if double_quant:
            raise ConfigError("double_quant stores the scales of quantised weights: give quantize (--quantize), too")
        return spec
    if kind not in KINDS:
        raise ConfigError(f"quantize {kind!r} is not known: expected one of {', '.join(KINDS)}")
    stored = {"quantize": kind, "double_quant": double_quant, "freeze": spec.text_decoder.lora is None}
    spec = spec.model_copy(update={"text_decoder": spec.text_decoder.model_copy(update=stored)})
    refuse_stored_dora(spec)
    return spec


def refuse_stored_dora(spec: ModelSpec) -> None:
    """Raise ConfigError for a DoRA adapter on a decoder in 8 or 4 bits."""
    kind, lora = spec.text_decoder.quantize, spec.text_decoder.lora
    if kind is not None and lora is not None and lora.use_dora:
        raise ConfigError(
            f"quantize {kind} found a DoRA adapter, which takes lengths of the whole weights: merge it first "
            "(mindspeed-mm merge), or leave quantize out"
        )


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(name, str):
        return name
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _media_of(located: Located) -> MediaProcessor | None:
    if not located.image_processor:
        return None
    processor = located.image_processor  # a folder, or what a run's checkpoint says
    with errors_name(processor if isinstance(processor, Path) else located.path):
        return located.spec.family.media_processor(located.spec, processor, pad=located.pad)


def _with_token_ids(located: Located, ids: dict[str, int]) -> Located:
    """With the placeholders of a family whose tokens are in the tokenizer."""
    if not ids:
        return located
    family = located.spec.family
    return replace(located, image_token_id=family.image_token_id(ids), placeholder_ids=family.placeholder_ids(ids))


def _join_ranks(platform: Platform, tensor: int, pipeline: int) -> None:
    """Model-parallel groups of `tensor` x `pipeline` processes, or of this process alone."""
    if tensor * pipeline == 1:
        init_single_process(platform)
        return
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized() and _parallel_sizes() == (tensor, pipeline):
        return  # by the caller, who may run several copies of the model
    initialized = torch.distributed.is_initialized()
    size = torch.distributed.get_world_size() if initialized else int(os.environ.get("WORLD_SIZE", "1"))
    if size != tensor * pipeline:
        raise ConfigError(
            f"tensor-parallel size {tensor} and pipeline-parallel size {pipeline} need {tensor * pipeline} processes, "
            f"found {size}: start with torchrun --nproc_per_node {tensor * pipeline}"
        )
    if not initialized:
        meet(platform)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
    if _parallel_sizes() != (tensor, pipeline):
        raise ConfigError(
            f"this process already runs at tensor- and pipeline-parallel sizes {_parallel_sizes()}, "
            f"{(tensor, pipeline)} was asked for: start new processes for it"
        )


def _parallel_sizes() -> tuple[int, int]:
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
