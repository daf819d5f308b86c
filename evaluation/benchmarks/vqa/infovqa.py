"""InfographicVQA (Mathew et al., WACV 2022): ANLS."""

from evaluation.benchmarks.vqa._open import OpenQuestions
from evaluation.scorers import anls

BENCHMARKS = (
    OpenQuestions(
        "InfoVQA_VAL", anls.kit_score, anls.strict_score, "ANLS", aliases=("InfoVQA", "InfographicVQA", "infographic")
    ),
    OpenQuestions("InfoVQA_TEST", anls.kit_score, anls.strict_score, "ANLS", submission="docvqa"),
)
