"""ScienceQA (Lu et al., NeurIPS 2022). VLMEvalKit's tables leave out questions without an image; LLaVA asks them too,
which is what `text_questions` is for."""

from dataclasses import dataclass

from evaluation.benchmarks.mcq._choice import MultipleChoice, options_of
from evaluation.prompts import LETTER_INSTRUCTION
from evaluation.tsv import Table

NO_CONTEXT = "N/A"
"""What LLaVA's conversion (CQM-A) writes for a question without a hint."""


@dataclass(frozen=True)
class ScienceQA(MultipleChoice):
    """Multiple choice whose official prompt has the form context, question, options in one line."""

    def official_texts(self, table: Table) -> dict[int | str, str]:
        """The form CQM-A of LLaVA's convert_sqa_to_llava."""
        texts = {}
        for row in table.rows:
            options = " ".join(f"({letter}) {text}" for letter, text in options_of(row.cells).items())
            context = row.cells.get("hint") or NO_CONTEXT
            question = f"Context: {context}\nQuestion: {row.cells['question']}\nOptions: {options}"
            texts[row.index] = f"{question}\n{LETTER_INSTRUCTION}"
        return texts


BENCHMARKS = (ScienceQA("ScienceQA_TEST", aliases=("ScienceQA",)), ScienceQA("ScienceQA_VAL"))
