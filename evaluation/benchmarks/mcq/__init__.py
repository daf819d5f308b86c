"""Multiple-choice benchmarks; one answer letter per question."""
