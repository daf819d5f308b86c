"""Benchmarks of descriptions, whose sentences a judge reads."""
