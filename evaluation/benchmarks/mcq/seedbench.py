"""SEED-Bench (Li et al., CVPR 2024), the questions on images."""

from evaluation.benchmarks.mcq._choice import MultipleChoice

BENCHMARK = MultipleChoice("SEEDBench_IMG", aliases=("SEEDBench", "SEED", "SEEDBench2", "SEEDBench2_Plus"))
