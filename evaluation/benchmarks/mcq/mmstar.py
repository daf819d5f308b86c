"""MMStar (Chen et al., NeurIPS 2024): questions that cannot be answered without the image."""

from evaluation.benchmarks.mcq._choice import MultipleChoice

BENCHMARK = MultipleChoice("MMStar")
