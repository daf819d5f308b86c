"""ScienceQA (Lu et al., NeurIPS 2022), test split; only questions with a picture are asked."""

from evaluation.benchmarks.mcq._choice import MultipleChoice

BENCHMARK = MultipleChoice("ScienceQA_TEST")
