"""TextVQA (Singh et al., CVPR 2019): agreement with ten people.

LLaVA's published score is with a line of recognised words in the prompt. They are read from a column ocr_tokens, or
from ocr_tokens.json beside the table: {index: [word, ...]}; without either, the official prompt has no such line.
"""

import json
import logging
from dataclasses import dataclass

from evaluation.benchmarks.vqa._open import OpenQuestions
from evaluation.prompts import SHORT_INSTRUCTION
from evaluation.scorers import vqa
from evaluation.scorers.cells import strict_answers
from evaluation.scorers.textvqa_prompt import OCR_LINE
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

TOKENS_COLUMN = "ocr_tokens"
TOKENS_FILE = "ocr_tokens.json"


@dataclass(frozen=True)
class TextVQA(OpenQuestions):
    """Open questions whose official prompt shows the words that an OCR system found."""

    def official_texts(self, table: Table) -> dict[int | str, str]:
        """Question, line of words, instruction, as in LLaVA's question file."""
        words = _words(table)
        if words is None:
            logger.warning(
                "%s: neither column %s nor %s beside it; the prompts have no OCR line, as LLaVA's published score has",
                table.path,
                TOKENS_COLUMN,
                TOKENS_FILE,
            )
            return super().official_texts(table)
        return {
            row.index: f"{row.cells['question']}\n{OCR_LINE}{', '.join(words[str(row.index)])}\n{SHORT_INSTRUCTION}"
            for row in table.rows
        }


def _words(table: Table) -> dict[str, list[str]] | None:
    if TOKENS_COLUMN in table.columns:
        return {str(row.index): strict_answers(row.cells[TOKENS_COLUMN]) for row in table.rows}
    path = table.path.parent / TOKENS_FILE
    if not path.is_file():
        return None
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; expected an object of lists of words by index.") from error
    missing = [row.index for row in table.rows if not isinstance(words.get(str(row.index)), list)]
    if missing:
        raise DataError(f"{path} has no list of words for {len(missing)} rows, for example index {missing[0]}; add it.")
    return words


BENCHMARK = TextVQA("TextVQA_VAL", vqa.kit_score, vqa.strict_score, "VQA accuracy", aliases=("TextVQA",))
