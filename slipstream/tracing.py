"""Distributed traces: one for a request, through the frontend and both its workers, sent out by OTLP over gRPC.

    with tracing.exporting(settings.tracing, service="slipstream-frontend", instance="frontend-0"):
        span = tracing.start("POST /v1/completions", request_headers)
        route = span.child("route")
        ...
        route.end()
        stub.Infer(request, metadata=span.metadata())   # the other process's spans become children of this one
        span.end()

Off unless an endpoint is set. Then every span is the one `OFF`, whose methods do nothing, and OpenTelemetry's SDK is
not even imported. Contexts travel in W3C `traceparent` and `tracestate`, as HTTP headers and as gRPC metadata.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slipstream import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

    from slipstream.settings import TracingSettings

Value = str | int | float | bool
Metadata = tuple[tuple[str, str], ...]

EXPORT_TIMEOUT_S = 5.0
"""Longest one export may take; also about the longest that a process which ends waits for a collector that is gone."""

_tracer: Tracer | None = None


class Span:
    """A span that is not recorded; also the interface of the others. All times are Unix nanoseconds."""

    __slots__ = ()

    recording = False
    trace_id = ""

    def child(self, name: str, *, start_ns: int | None = None, calls: bool = False) -> Span:
        """A stage of this one. `calls`: it is a call to another process, whose spans will be its children."""
        return self

    def set(self, name: str, value: Value) -> None:
        """Note a fact."""

    def fail(self, reason: str) -> None:
        """Say that what the span stands for did not succeed."""

    def end(self, end_ns: int | None = None) -> None:
        """Ended now, or at that time. The first end counts."""

    def metadata(self) -> Metadata | None:
        """What tells another process of this span, as gRPC metadata."""
        return None


OFF = Span()
"""What everything is while nothing is traced."""


class _Recorded(Span):
    __slots__ = ("_ended", "_span", "recording", "trace_id")

    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        self._ended = False
        self.recording = span.is_recording()
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def child(self, name: str, *, start_ns: int | None = None, calls: bool = False) -> Span:
        if not self.recording or _tracer is None:
            return self
        from opentelemetry.trace import SpanKind, set_span_in_context

        kind = SpanKind.CLIENT if calls else SpanKind.INTERNAL
        parent = set_span_in_context(self._span)
        return _Recorded(_tracer.start_span(name, parent, kind=kind, start_time=start_ns))

    def set(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)

    def fail(self, reason: str) -> None:
        from opentelemetry.trace import StatusCode

        if not self._ended:
            self._span.set_status(StatusCode.ERROR, reason)

    def end(self, end_ns: int | None = None) -> None:
        if not self._ended:  # a child of a span that is not sampled is that span itself
            self._ended = True
            self._span.end(end_ns)

    def metadata(self) -> Metadata | None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return tuple(carrier.items())


def enabled() -> bool:
    """Whether spans are recorded in this process."""
    return _tracer is not None


def start(
    name: str,
    headers: Mapping[str, str] | Iterable[tuple[str, Any]] | None = None,
    *,
    start_ns: int | None = None,
) -> Span:
    """The first span of a request in this process.

    Args:
        headers: HTTP headers or gRPC metadata, with lower-case names, in which the caller's `traceparent` may be.
    """
    if _tracer is None:
        return OFF
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = dict(headers) if headers is not None else {}
    parent = TraceContextTextMapPropagator().extract(carrier)
    return _Recorded(_tracer.start_span(name, parent, kind=SpanKind.SERVER, start_time=start_ns))


def unix_ns(monotonic_s: float) -> int:
    """A reading of `time.monotonic()`, of any process of this machine, as Unix time."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


@contextmanager
def exporting(settings: TracingSettings, *, service: str, instance: str) -> Iterator[None]:
    """Record and export spans while the block runs; what is left is sent at its end.

    Starts a thread and a gRPC channel: enter it after everything that forks.

    Args:
        service: what this process is, as `service.name`.
        instance: which one it is, as `service.instance.id`.
    """
    global _tracer
    if settings.endpoint is None:
        yield
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        # The caller's decision counts; ours is only about requests that come without one.
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        resource=Resource.create(
            {"service.name": service, "service.instance.id": instance, "service.version": __version__}
        ),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(
        endpoint=settings.endpoint,
        insecure=not settings.endpoint.startswith("https://"),
        timeout=EXPORT_TIMEOUT_S,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=settings.export_every_s * 1000))
    _tracer = provider.get_tracer("slipstream", __version__)
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()
