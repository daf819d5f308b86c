"""Benchmarks with open questions; the answer is a short text."""
