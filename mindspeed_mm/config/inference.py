"""inference_llava.json: the guide's one-file config of `mindspeed-mm infer`."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel
from mindspeed_mm.constants import IMAGE_TOKEN


class TokenizerBlock(StrictModel):
    """Where the tokenizer is; the files of the folder decide which it is."""

    from_pretrained: str
    hub_backend: Literal["hf"] = "hf"
    autotokenizer_name: str = "AutoTokenizer"
    use_fast: bool = False
    trust_remote_code: Literal[False] = False


class InferenceFile(StrictModel):
    """Keys beside the model blocks. Only what differs from the defaults must be given. The requests come from a file of
    their own; prompts and images given here are not asked."""

    pipeline_class: Literal["LlavaPipeline"] = "LlavaPipeline"
    tokenizer: TokenizerBlock | None = None
    """Default: the tokenizer that comes with the weights."""
    image_processer_path: str | None = None
    """Default: the preprocessor_config.json that comes with the weights."""
    image_path: str | list[str] | None = None
    """One image, or one a prompt; a single image with several prompts is asked about by each, a single prompt with
    several `<image>` may take several images."""
    prompts: str | list[str] | None = None
    generation_config: dict[str, Any] = {}
    dtype: Literal["fp32", "float32", "fp16", "float16", "half", "bf16", "bfloat16"] | None = None
    device: str | None = None
    """"npu", "cuda" or "cpu", an index behind a colon is left to the launcher; --device wins."""


class InferenceConfig(InferenceFile):
    """The same with the prompts to answer."""

    prompts: str | list[str]

    @pydantic.field_validator("prompts")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value and isinstance(value, list):
            raise ValueError("there is no prompt: give at least one")
        return value

    @property
    def questions(self) -> list[tuple[str, tuple[str, ...]]]:
        """(prompt, its images). One prompt with as many `<image>` as there are images takes them all; else images
        and prompts go together one by one, or one of either with all of the other.

        Raises:
            ValueError: the two lists do not fit.
        """
        prompts = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        if self.image_path is None or isinstance(self.image_path, str):
            images = () if self.image_path is None else (self.image_path,)
            return [(prompt, images) for prompt in prompts]
        if len(prompts) == 1 and len(self.image_path) > 1 and prompts[0].count(IMAGE_TOKEN) == len(self.image_path):
            return [(prompts[0], tuple(self.image_path))]
        if len(prompts) == 1:
            prompts = prompts * len(self.image_path)
        if len(prompts) != len(self.image_path):
            raise ValueError(
                f"image_path has {len(self.image_path)} images for {len(prompts)} prompts: "
                "give one each, or one for all"
            )
        return [(prompt, (path,)) for prompt, path in zip(prompts, self.image_path, strict=True)]
