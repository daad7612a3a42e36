"""What the server counts, in the form of Prometheus and under the names that vLLM made known, with a prefix of ours.

Prompt tokens count once per prompt, as in `usage`: n answers to one prompt read it once. The counters hold the tokens
of every prompt that was opened and every token that has reached the HTTP side, so they equal the summed `usage` of
all answers that were complete, plus what answers that broke off had got until then (one that is wanted whole gets its
first token at once and the others with its ending).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from utils.serving.client import State

PREFIX = "paddle_llm:"
# Seconds; from a small model on a GPU to a large one on a CPU with a long queue.
FIRST_TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
BETWEEN_TOKENS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
LENGTHS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
REASONS = ("stop", "length", "abort", "error")


class _StateCollector(Collector):
    """The state of the model's process at the moment of asking."""

    def __init__(self, state: Callable[[], State], model: str) -> None:
        self._state, self._model = state, model

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        gauges = [
            ("num_requests_running", "answers in the making", state.running),
            ("num_requests_waiting", "answers in the queue", state.waiting),
            ("kv_cache_used_bytes", "memory of keys and values in use", state.cache_used_bytes),
            ("model_ready", "1 if the model's process takes requests", int(state.name == "ready")),
        ]
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        steps = CounterMetricFamily(
            PREFIX + "engine_steps", "steps of the engine since it started", labels=["model_name"]
        )
        steps.add_metric([self._model], state.steps)
        yield steps


class Metrics:
    """All counters of one server, in a registry of their own.

    Args:
        models: served names; the first is the base.
        state: of the model's process.
    """

    def __init__(self, models: list[str], state: Callable[[], State]) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.registry.register(_StateCollector(state, models[0]))
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of the prompts that were read")
        self.generation_tokens = self._counter("generation_tokens", "tokens that were generated")
        self.cache_queries = self._counter(
            "prefix_cache_queries", "tokens of prompts that were looked for in the cache"
        )
        self.cache_hits = self._counter("prefix_cache_hits", "tokens of prompts that were found in the cache")
        self.finished = self._counter("request_success", "answers that ended, by reason", "finished_reason")
        self.first_token = self._histogram("time_to_first_token_seconds", "from request to first token", FIRST_TOKEN)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "between two tokens", BETWEEN_TOKENS)
        self.whole = self._histogram("e2e_request_latency_seconds", "from request to the end of its answer", WHOLE)
        self.queued = self._histogram("request_queue_time_seconds", "from request to the reading of its prompt", WHOLE)
        self.prompt_lengths = self._histogram("request_prompt_tokens", "tokens of a prompt", LENGTHS)
        self.answer_lengths = self._histogram("request_generation_tokens", "tokens of an answer", LENGTHS)
        self.responses = Counter(
            PREFIX + "http_responses", "responses by route and status", ["route", "status"], registry=self.registry
        )
        for model in models:  # so that each is there from the start, with 0
            for metric in (self.prompt_tokens, self.generation_tokens, self.cache_queries, self.cache_hits):
                metric.labels(model)
            for reason in REASONS:
                self.finished.labels(model, reason)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """All of it in the text form of Prometheus."""
        return generate_latest(self.registry)
