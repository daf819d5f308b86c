"""DocVQA (Mathew et al., WACV 2021): questions on scanned pages; ANLS."""

from evaluation.benchmarks.vqa._open import OpenQuestions
from evaluation.scorers import anls

BENCHMARKS = (
    OpenQuestions("DocVQA_VAL", anls.kit_score, anls.strict_score, "ANLS", aliases=("DocVQA",)),
    OpenQuestions("DocVQA_TEST", anls.kit_score, anls.strict_score, "ANLS", submission="docvqa"),
)
