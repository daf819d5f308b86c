"""inference_llava.json: the guide's one-file config of `mindspeed-mm infer`."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel


class TokenizerBlock(StrictModel):
    """Where the tokenizer is; the files of the folder decide which it is."""

    from_pretrained: str
    hub_backend: Literal["hf"] = "hf"
    autotokenizer_name: str = "AutoTokenizer"
    use_fast: bool = False
    trust_remote_code: Literal[False] = False


class InferenceConfig(StrictModel):
    """Keys beside the model blocks. Only what differs from the defaults must be given."""

    pipeline_class: Literal["LlavaPipeline"] = "LlavaPipeline"
    tokenizer: TokenizerBlock | None = None
    """Default: the tokenizer that comes with the weights."""
    image_processer_path: str | None = None
    """Default: the preprocessor_config.json that comes with the weights."""
    image_path: str | list[str] | None = None
    """One picture, or one a prompt; a single picture with several prompts is asked about by each."""
    prompts: str | list[str]
    generation_config: dict[str, Any] = {}
    dtype: Literal["fp32", "float32", "fp16", "float16", "half", "bf16", "bfloat16"] | None = None
    device: str | None = None
    """"npu", "cuda" or "cpu", an index behind a colon is left to the launcher; --device wins."""

    @pydantic.field_validator("prompts")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("a prompt is empty: give it a text")
        return value

    @property
    def pairs(self) -> list[tuple[str, str | None]]:
        """(prompt, picture or None). Raises ValueError when the two lists do not fit."""
        prompts = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        if self.image_path is None or isinstance(self.image_path, str):
            return [(prompt, self.image_path) for prompt in prompts]
        if len(prompts) == 1:
            prompts = prompts * len(self.image_path)
        if len(prompts) != len(self.image_path):
            raise ValueError(
                f"image_path has {len(self.image_path)} pictures for {len(prompts)} prompts: "
                "give one each, or one for all"
            )
        return list(zip(prompts, self.image_path, strict=True))
