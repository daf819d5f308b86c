"""Benchmarks with yes-no questions."""
