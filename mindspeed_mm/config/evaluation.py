"""evaluate_llava1_5.json: the guide's one-file config of `mindspeed-mm evaluate`."""

from __future__ import annotations

from typing import Any, Literal

from mindspeed_mm.config.inference import TokenizerBlock
from mindspeed_mm.config.load import StrictModel


class EvaluationConfig(StrictModel):
    """Keys beside the model blocks. Only what differs from the defaults must be given."""

    dataset_path: str
    """The benchmark's TSV, or its questions as JSON lines."""
    evaluation_dataset: str
    """A benchmark's name in any case, or a name of one's own for one's own TSV."""
    result_output_path: str
    evaluation_model: str = "llava_v1.5_7b"
    """Name of the model in the result files."""
    tokenizer: TokenizerBlock | None = None
    """Default: the tokenizer that comes with the weights."""
    image_processer_path: str | None = None
    """Default: the preprocessor_config.json that comes with the weights."""
    generation_config: dict[str, Any] = {}
    """Names of transformers' GenerationConfig. Default: greedy, at most 128 new tokens."""
    dtype: Literal["fp32", "float32", "fp16", "float16", "half", "bf16", "bfloat16"] | None = None
    device: str | None = None
    """"npu", "cuda" or "cpu", an index behind a colon is left to the launcher; --device wins."""
