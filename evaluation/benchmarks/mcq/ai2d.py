"""AI2D: science diagrams (Kembhavi et al., ECCV 2016), test questions in VLMEvalKit's table."""

from evaluation.benchmarks.mcq._choice import MultipleChoice

BENCHMARK = MultipleChoice("AI2D_TEST", aliases=("AI2D",))
