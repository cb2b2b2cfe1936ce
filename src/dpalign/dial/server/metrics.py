"""The server's metrics in Prometheus's format, for GET /metrics."""

from collections.abc import Callable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]  # an unread gauge beside each counter

SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Bounds of the histograms' buckets."""


class Metrics:
    """The counters of one server, in Prometheus's form.

    Args:
        now: current values by name; each becomes a gauge `dpa_NAME`.
    """

    def __init__(self, now: Callable[[], Mapping[str, float]]) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("dpa_requests", "Requests answered", ("route", "code"), registry=own)
        self.seconds = Histogram(
            "dpa_request_seconds", "From request to last byte", ("route",), buckets=SECONDS, registry=own
        )
        self.first = Histogram(
            "dpa_first_token_seconds", "From request to the first piece of its answer", buckets=SECONDS, registry=own
        )
        self.gone = Counter("dpa_disconnects", "Clients that left before their answer was complete", registry=own)
        self.work = {
            "prompt_tokens": Counter("dpa_prompt_tokens", "Tokens of prompts answered", registry=own),
            "generated_tokens": Counter("dpa_generated_tokens", "Tokens drawn", registry=own),
            "scored_answers": Counter("dpa_scored_answers", "Answers that the reward model scored", registry=own),
        }
        self.registry.register(_Gauges(now))

    def count(self, what: str, amount: float) -> None:
        """Count work of the service; see `Service.on_work`."""
        self.first.observe(amount) if what == "first_token_seconds" else self.work[what].inc(amount)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges(Collector):
    """Gauges whose values are read at each request for the metrics."""

    def __init__(self, now: Callable[[], Mapping[str, float]]) -> None:
        self.now = now

    def collect(self) -> list[GaugeMetricFamily]:
        return [
            GaugeMetricFamily(f"dpa_{name}", name.replace("_", " "), value=value) for name, value in self.now().items()
        ]
