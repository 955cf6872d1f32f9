"""The numbers of a service for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From the embedded model on a GPU to Stable Diffusion on a small CPU.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


class ServeMetrics:
    """Every number that a service counts.

    The labels are names that the service's owner gave, routes and codes of this program: nothing
    that a request says, which could be anything and would fill the memory.
    """

    def __init__(self) -> None:
        # Its own registry: two services in one process do not count for each other.
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.request_seconds = self._histogram(
            "request_seconds", "From a request's head to the end of its answer.", "route"
        )
        self.images = self._counter("images", "Images delivered.", "model")
        self.refusals = self._counter("refusals", "Requests that were not answered.", "reason")
        # Looking a label up takes as long as counting, and a flood asks for the same ones.
        self._unread_requests = self.requests.labels("none", "429")
        self._unread_refusals = self.refusals.labels("rate_limit_exceeded")
        self._queue = Gauge(
            "hipa_queue_images", "Images that wait.", ["bundle"], registry=self._registry
        )
        self._waits = self._histogram("queue_seconds", "What an image waited.", "bundle")
        self._batch_images = self._histogram(
            "batch_images", "Images of a batch.", "bundle", buckets=_BATCH
        )
        self._batch_seconds = self._histogram("batch_seconds", "What a batch took.", "bundle")
        self._stages = self._histogram(
            "stage_seconds", "What a stage of a batch took.", "bundle", "stage"
        )
        self.encode_seconds = self._histogram(
            "encode_seconds", "What the image files of a request took.", "format"
        )
        self._swaps = self._histogram("swap_seconds", "What an adaptor's swap took.", "bundle")
        self.ready = Gauge(
            "hipa_ready", "1 while every bundle makes images.", registry=self._registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hipa_{name}", text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        return Histogram(f"hipa_{name}", text, labels, registry=self._registry, buckets=buckets)

    def queue_length(self, bundle: str, waiting: Callable[[], int]) -> None:
        """Read the queue's length whenever somebody asks for the metrics."""
        self._queue.labels(bundle).set_function(waiting)

    def watch(self, bundle: str) -> BundleWatch:
        """What counts for one bundle."""
        return BundleWatch(
            self._waits.labels(bundle),
            self._batch_images.labels(bundle),
            self._batch_seconds.labels(bundle),
            self._swaps.labels(bundle),
            lambda stage: self._stages.labels(bundle, stage),
        )

    def refused_unread(self) -> None:
        """Count a request that was refused because no image can wait, and was not even parsed."""
        self._unread_requests.inc()
        self._unread_refusals.inc()

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)


class BundleWatch:
    """The metrics of one bundle, as its batcher calls them."""

    def __init__(
        self,
        waits: Histogram,
        batch_images: Histogram,
        batch_seconds: Histogram,
        swaps: Histogram,
        stage: Callable[[str], Histogram],
    ) -> None:
        self._waits = waits
        self._batch_images = batch_images
        self._batch_seconds = batch_seconds
        self._swaps = swaps
        self._stage = stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.perf_counter()
        yield
        self._stage(name).observe(time.perf_counter() - started)

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self._batch_images.observe(images)
        self._batch_seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        """Count the wait of an image."""
        self._waits.observe(seconds)

    def swapped(self, seconds: float) -> None:
        """Count a swap."""
        self._swaps.observe(seconds)
