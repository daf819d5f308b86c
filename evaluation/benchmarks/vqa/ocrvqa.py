"""OCR-VQA (Mishra et al., ICDAR 2019): questions on book covers; equal texts."""

from evaluation.benchmarks.vqa._open import OpenQuestions
from evaluation.scorers import exact

BENCHMARK = OpenQuestions(
    "OCRVQA_TEST", exact.kit_best, exact.strict_score, "exact match", aliases=("OCRVQA", "OCRVQA_TESTCORE")
)
