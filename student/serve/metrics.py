"""What the service counts and times, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from student.evaluate.evidence import Certificate

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ELSEWHERE = "none"  # the route of a path that is no route: paths themselves are without number


class Metrics:
    """One service's, in a registry of its own."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("retort_requests", "Requests by route and status.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "retort_request_seconds",
            "From a request's head to its answer's end.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.comments = Counter(
            "retort_comments", "Comments answered, and set aside by reason.", ["outcome"], registry=registry
        )
        self.fallbacks = Counter(
            "retort_fallbacks", "Comments the student was unsure of, by who answered them.", ["source"], registry=registry
        )
        self._batch = Histogram("retort_batch_comments", "Comments decoded together.", buckets=SIZES, registry=registry)
        self._batch_seconds = Histogram("retort_batch_seconds", "To decode a batch.", buckets=SECONDS, registry=registry)
        self._queue = Gauge("retort_queue_comments", "Comments that wait.", registry=registry)

        if certificate:
            self._certify(certificate)
        self._audits = Counter("retort_audits", "Own answers the teacher was asked about.", ["agrees"], registry=registry)
        self._audit = Gauge("retort_audit_agreement", "Of the latest 500 audits; its 95 % interval.", ["is"], registry=registry)
        self.alarm = Gauge("retort_audit_alarm", "1 where audits agree less often than certified.", registry=registry)

    def audited(self, agrees: bool, agreement: float, low: float, high: float) -> None:
        """Counts an audit."""
        self._audits.labels(str(agrees).lower()).inc()
        for label, value in (("mean", agreement), ("low", low), ("high", high)):
            self._audit.labels(label).set(value)

    def _certify(self, certificate: Certificate) -> None:
        agreement = Gauge(
            "retort_certified_agreement", "Least share of the student's own answers.", ["of"], registry=self._registry
        )
        for name, bound in certificate.bounds.items():
            agreement.labels(name).set(bound)
        Gauge("retort_certified_coverage", "Share of texts for the student alone.", registry=self._registry).set(
            certificate.coverage
        )

    def batch(self, size: int, seconds: float) -> None:
        """Counts a batch."""
        self._batch.observe(size)
        self._batch_seconds.observe(seconds)

    def watch_drift(self, names: list[str], index: Callable[[str], float]) -> None:
        """Says what tells how far the latest 1,000 texts are from those of the evaluation."""
        help_ = "Population stability index of the latest 1,000 answers by field, and of the texts' lengths."
        gauge = Gauge("retort_drift_index", help_, ["of"], registry=self._registry)
        for name in names:
            gauge.labels(name).set_function(partial(index, name))

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Says what tells how many comments wait."""
        self._queue.set_function(waiting)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """Counts and times an application's requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", ELSEWHERE)
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)
