"""VQAv2 (Goyal et al., CVPR 2017): agreement with ten people; the test splits are scored by a server."""

from evaluation.benchmarks.vqa._open import OpenQuestions
from evaluation.scorers import vqa

BENCHMARKS = (
    OpenQuestions("VQAv2_VAL", vqa.kit_score, vqa.strict_score, "VQA accuracy", aliases=("VQAv2",), submission="vqa"),
    OpenQuestions("VQAv2_TESTDEV", vqa.kit_score, vqa.strict_score, "VQA accuracy", submission="vqa"),
)
