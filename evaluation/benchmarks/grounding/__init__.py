"""Benchmarks whose answers are boxes."""
