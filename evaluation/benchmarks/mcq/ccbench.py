"""CCBench: Chinese culture, of the MMBench authors; each question is asked once."""

from evaluation.benchmarks.mcq._choice import MultipleChoice

BENCHMARK = MultipleChoice("CCBench", rotations=None)
