"""Prometheus metrics of a serving engine, in a registry of its own; none if prometheus-client is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from stepfusion.serving.served_request import Timings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """What is counted, by those who do it. This one forgets everything."""

    registry: CollectorRegistry | None = None

    def queue(self, requests: int, images: int) -> None:
        """So many wait."""

    def lanes(self, busy: int, lanes: int) -> None:
        """So many lanes have an image, of so many."""

    def tick(self) -> None:
        """A pool of lanes ticked."""

    def rejected(self, reason: str) -> None:
        """A request was refused: "invalid", "overloaded", "deadline", "closed" or "dead"."""

    def ended(self, outcome: str, images: int, timings: Timings) -> None:
        """A request that was accepted ended, with so many images done."""

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return b""


class PrometheusMetrics(Metrics):
    """The same in a registry."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = self.registry = CollectorRegistry()
        name = "stepfusion_"
        self._requests = Gauge(f"{name}requests_active", "Requests accepted and not ended", registry=registry)
        self._waiting = Gauge(f"{name}queue_images", "Images that wait for a lane", registry=registry)
        self._lanes = Gauge(f"{name}lanes", "Lanes", registry=registry)
        self._busy = Gauge(f"{name}lanes_busy", "Lanes with an image", registry=registry)
        self._ticks = Counter(f"{name}ticks", "Ticks of pools of lanes", registry=registry)
        self._images = Counter(f"{name}images", "Images done", registry=registry)
        self._ended = Counter(f"{name}requests", "Requests that ended", ["outcome"], registry=registry)
        self._rejected = Counter(f"{name}rejected", "Requests that were refused", ["reason"], registry=registry)
        self._seconds = Histogram(
            f"{name}request_seconds", "Time of requests by stage", ["stage"], registry=registry, buckets=_SECONDS
        )

    def queue(self, requests: int, images: int) -> None:
        self._requests.set(requests)
        self._waiting.set(images)

    def lanes(self, busy: int, lanes: int) -> None:
        self._busy.set(busy)
        self._lanes.set(lanes)

    def tick(self) -> None:
        self._ticks.inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def ended(self, outcome: str, images: int, timings: Timings) -> None:
        self._images.inc(images)
        self._ended.labels(outcome).inc()
        for stage in ("queued", "running", "total"):
            self._seconds.labels(stage).observe(getattr(timings, stage))

    def exposition(self) -> bytes:
        from prometheus_client import generate_latest

        assert self.registry is not None
        return generate_latest(self.registry)


def make_metrics() -> Metrics:
    """Metrics for Prometheus, if its client is installed."""
    return PrometheusMetrics() if find_spec("prometheus_client") else Metrics()
