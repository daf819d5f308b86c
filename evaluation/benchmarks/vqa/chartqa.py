"""ChartQA (Masry et al., Findings of ACL 2022): relaxed accuracy, per split human and augmented."""

from evaluation.benchmarks.vqa._open import OpenQuestions
from evaluation.scorers import relaxed


def _kit_score(answer: str, prediction: str) -> float:
    return float(max(relaxed.kit_matches(answer, prediction)))


def _strict_score(answer: str, prediction: str) -> float:
    return float(relaxed.strict_match(answer, prediction))


BENCHMARK = OpenQuestions("ChartQA_TEST", _kit_score, _strict_score, "relaxed accuracy", aliases=("ChartQA",))
