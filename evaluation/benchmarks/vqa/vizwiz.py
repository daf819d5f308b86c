"""VizWiz-VQA (Gurari et al., CVPR 2018): questions of blind people; the test split is scored by a server."""

from dataclasses import dataclass

from evaluation.benchmarks.vqa._open import OpenQuestions, with_short_instruction
from evaluation.prompts import SHORT_INSTRUCTION
from evaluation.scorers import vqa
from evaluation.tsv import Table

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""Line of LLaVA's VizWiz question file."""


@dataclass(frozen=True)
class VizWiz(OpenQuestions):
    """Open questions, some of which cannot be answered."""

    def official_texts(self, table: Table) -> dict[int | str, str]:
        """LLaVA's question file: question, how to refuse, instruction."""
        texts = {}
        for row in table.rows:
            question = row.cells["question"]
            plain = UNANSWERABLE not in question
            texts[row.index] = f"{question}\n{UNANSWERABLE}\n{SHORT_INSTRUCTION}" if plain else question
            texts[row.index] = with_short_instruction(texts[row.index])
        return texts


BENCHMARK = VizWiz("VizWiz", vqa.kit_score, vqa.strict_score, "VQA accuracy", ("VizWiz_TEST",), "vizwiz")
