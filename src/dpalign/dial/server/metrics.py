"""What a server counts, in Prometheus's form."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside each counter that nobody reads

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server.

    Args:
        now: what is going on at this moment, by name: each becomes a gauge `dpa_NAME`.
    """

    def __init__(self, now: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        routed = ("route",)
        self.requests = Counter(
            "dpa_requests", "Requests answered, by route and status code", (*routed, "code"), registry=own
        )
        self.seconds = Histogram(
            "dpa_request_seconds", "From request to last byte", routed, buckets=SECONDS, registry=own
        )
        self.first = Histogram(
            "dpa_first_token_seconds", "From request to the first of its answer", buckets=SECONDS, registry=own
        )
        self.prompt_tokens = Counter("dpa_prompt_tokens", "Tokens of prompts answered", registry=own)
        self.generated_tokens = Counter("dpa_generated_tokens", "Tokens drawn", registry=own)
        self.gone = Counter("dpa_disconnects", "Clients that left before their answer was complete", registry=own)
        self.scored = Counter("dpa_scored_answers", "Answers that the reward model scored", registry=own)
        self.registry.register(_Now(now))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, now: Callable[[], Mapping[str, float]]) -> None:
        self.now = now

    def collect(self) -> list[GaugeMetricFamily]:
        return [
            GaugeMetricFamily(f"dpa_{name}", name.replace("_", " "), value=value) for name, value in self.now().items()
        ]
