"""`mm.load`: any readable weights -> a model that gives logits, features and text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.locate import locate
from mindspeed_mm.models.part import DTYPES
from mindspeed_mm.platform import get_platform
from mindspeed_mm.platform.distributed import init_single_process

if TYPE_CHECKING:
    from mindspeed_mm.loaded import LoadedVLM

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    image_processor: str | Path | None = None,
) -> LoadedVLM:
    """Load a whole model for inference.

    Args:
        path: a folder in llava-hf or liuhaotian layout, a folder of converted files with their model.json, a training
            checkpoint (the save folder or one iteration), or a model.json whose ckpt_path entries name the weights.
        device: "npu", "cuda", "cpu"; None: the first that is there.
        dtype: "fp32", "bf16", "fp16" or a torch dtype; None: fp32 on the CPU, else what the weights are stored in.
        tokenizer, image_processor: folders that override what comes with the weights.

    Raises:
        WeightError: the path holds no whole model, or a damaged one.
        ConfigError: the model's spec is missing or wrong; unknown device or dtype.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not known: expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    located = locate(Path(path), tokenizer=tokenizer, image_processor=image_processor)
    platform = get_platform(device)
    # Modules below import megatron.core, which the platform has just prepared.
    from mindspeed_mm.loaded import LoadedVLM
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.weights.loading import table

    init_single_process(platform)
    if dtype is None:
        dtype = torch.float32 if platform.name == "cpu" else located.spec.text_decoder.dtype or torch.bfloat16
    vlm, reports = build_vlm(located.spec, Runtime(params_dtype=dtype), platform.device(), sources=located.sources)
    logger.info("weights of %s:\n%s", path, table(reports))
    words = load_tokenizer(located.tokenizer) if located.tokenizer else None
    processor = ImageProcessor.from_config(located.image_processor) if located.image_processor else None
    return LoadedVLM(vlm, located, words, processor)
