"""Counts and times of a server, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class ServingMetrics:
    """The metrics of one server, in a registry of its own: several servers of a process do not mix."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()

        def make(kind, name, text, labels=(), **more):
            return kind(f"mindspeed_mm_{name}", text, labels, registry=self._registry, **more)

        self.requests = make(Counter, "requests", "Chat completions by the status of their end", ("status",))
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts, images included")
        self.cached_tokens = make(Counter, "cached_tokens", "Of those, tokens that were not computed again")
        self.new_tokens = make(Counter, "new_tokens", "Tokens of answers")
        self.first_text = make(Histogram, "first_text_seconds", "From arrival to the first text", buckets=SECONDS)
        self.duration = make(Histogram, "request_seconds", "From arrival to the end of the answer", buckets=SECONDS)
        make(Gauge, "requests_in_flight", "Requests that wait or run").set_function(in_flight)

    def text(self) -> bytes:
        """The answer to a scrape."""
        return generate_latest(self._registry)
