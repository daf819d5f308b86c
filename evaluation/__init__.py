"""Evaluation of vision-language models on benchmark tables: run, score, report."""

from evaluation.score import score

__all__ = ["score"]
