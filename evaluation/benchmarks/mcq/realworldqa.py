"""RealWorldQA (xAI, 2024) in VLMEvalKit's multiple-choice table."""

from evaluation.benchmarks.mcq._choice import MultipleChoice

BENCHMARK = MultipleChoice("RealWorldQA")
