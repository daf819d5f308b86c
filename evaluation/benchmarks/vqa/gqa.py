"""GQA (Hudson and Manning, CVPR 2019), the balanced test-dev questions; equal texts."""

from evaluation.benchmarks.vqa._open import OpenQuestions
from evaluation.scorers import exact

BENCHMARK = OpenQuestions(
    "GQA_TestDev_Balanced", exact.kit_mean, exact.strict_score, "exact match", aliases=("GQA",), submission="gqa"
)
