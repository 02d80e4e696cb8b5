"""Counts and times of a server, in Prometheus' form; never prompts, keys or seeds.

Knows names and buckets of metrics; does not know what a request is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from time import perf_counter
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
OUTCOMES = ("ok", "refused", "cancelled", "late", "error")


class Gauged(Protocol):
    """Something whose state is read when the metrics are: a batcher."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def slots_used(self) -> int: ...

    front_seconds: float


class Metrics:
    """The metrics of one server; `gauged` are its batchers by the names of their models."""

    def __init__(self, gauged: Mapping[str, Gauged]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_Gauges(gauged))
        self.requests = Counter("nar_requests_total", "Requests by outcome.", ["route", "outcome"], registry=registry)
        self.queue = self._seconds("nar_queue_seconds", "From arrival to the end of the first front.", "model")
        self.first_partial = self._seconds("nar_first_partial_seconds", "To the first picture on the way.", "model")
        self.whole = self._seconds("nar_request_seconds", "From arrival to the last result.", "route")

    def _seconds(self, name: str, text: str, label: str) -> Histogram:
        return Histogram(name, text, [label], buckets=_SECONDS, registry=self.registry)

    def began(self, route: str) -> Watch:
        """A request that arrived now."""
        return Watch(self, route)

    def text(self) -> bytes:
        """All metrics as /metrics gives them."""
        return generate_latest(self.registry)


class Watch:
    """The clock of one request; it is counted once, by its first outcome."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics, self._route, self._start = metrics, route, perf_counter()
        self._ended = self._saw_partial = False

    def partial(self, model: str) -> None:
        """A picture on the way was sent."""
        if not self._saw_partial:
            self._metrics.first_partial.labels(model).observe(perf_counter() - self._start)
        self._saw_partial = True

    def queued(self, model: str, seconds: float | None) -> None:
        """How long the request waited and took its first front; None where it never came so far."""
        if seconds is not None:
            self._metrics.queue.labels(model).observe(seconds)

    def end(self, outcome: str) -> None:
        """The request is over, in one of OUTCOMES."""
        if self._ended:
            return
        self._ended = True
        self._metrics.requests.labels(self._route, outcome).inc()
        if outcome == "ok":
            self._metrics.whole.labels(self._route).observe(perf_counter() - self._start)


class _Gauges(Collector):
    """State that is read when it is asked for."""

    def __init__(self, gauged: Mapping[str, Gauged]) -> None:
        self._gauged = gauged

    def collect(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> Iterator[Metric]:
        texts = {
            "nar_requests_running": ("Results that are being sampled.", "running"),
            "nar_requests_waiting": ("Results in the queue.", "waiting"),
            "nar_cache_slots": ("Slots of the cache.", "slots"),
            "nar_cache_slots_used": ("Slots that are taken: rows of a front.", "slots_used"),
            "nar_front_seconds": ("Mean time of the last fronts, of all rows together.", "front_seconds"),
        }
        for name, (text, attribute) in texts.items():
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model, batcher in self._gauged.items():
                family.add_metric([model], float(getattr(batcher, attribute)))
            yield family
