"""Prompt texts that benchmarks share: LLaVA's suffixes and VLMEvalKit's LLaVA prompt."""

from dataclasses import dataclass
from typing import Literal

from evaluation.tsv import Row, Table
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.errors import DataError

PromptStyle = Literal["official", "vlmevalkit"]
PROMPT_STYLES: tuple[PromptStyle, ...] = ("official", "vlmevalkit")
"""official: the model's own training template around the benchmark's text; vlmevalkit: that kit's LLaVA prompt."""

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
LETTER_INSTRUCTION_CN = "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
DIRECT_INSTRUCTION = "Answer the question directly."
DIRECT_INSTRUCTION_CN = "\u8bf7\u76f4\u63a5\u56de\u7b54\u95ee\u9898\u3002"
"""Suffixes of LLaVA's and VLMEvalKit's multiple-choice prompts; the Chinese ones where the text has Chinese in it."""
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."
"""Suffix of LLaVA's and VLMEvalKit's prompts for open questions."""

KIT_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: {images}{text} ASSISTANT: "
)
"""VLMEvalKit's LLaVA prompt; it says "human" and ends with a space, unlike LLaVA's own."""


@dataclass(frozen=True)
class Prompt:
    """One of the two is given: pairs (question, open answer None) for a template, or the finished text.

    Both hold one `<image>` per image.
    """

    turns: tuple[tuple[str, str | None], ...] | None = None
    text: str | None = None


def refuse_kit_style(benchmark: str, style: PromptStyle) -> None:
    """Raise DataError for another style than "official" of a benchmark that VLMEvalKit does not have."""
    if style != "official":
        raise DataError(f"VLMEvalKit has no prompt for {benchmark}; use the prompt style official.")


def images_first(text: str, row: Row, style: PromptStyle, table: Table) -> Prompt:
    """The prompt of a row whose images stand before the text. Raises DataError for a text that holds `<image>`."""
    if IMAGE_TOKEN in text:
        raise DataError(
            f"{table.path}, row with index {row.index}: the text holds {IMAGE_TOKEN}, which stands for an image; "
            "images are placed before the question. Remove it there."
        )
    if style == "official":
        return Prompt(turns=((f"{IMAGE_TOKEN}\n" * row.image_count + text, None),))
    return Prompt(text=KIT_PROMPT.format(images=f" {IMAGE_TOKEN} " * row.image_count, text=text))
