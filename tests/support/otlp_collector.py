"""A collector of traces, as OpenTelemetry's protocol describes it: a real gRPC server that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, slots=True)
class CollectedSpan:
    """One span as it came. Ids are hexadecimal; `parent` is empty for the first of a trace."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent: str
    start_ns: int
    end_ns: int
    kind: int
    failed: str
    attributes: dict[str, Any]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens at `endpoint`."""

    endpoint: str = ""
    spans: list[CollectedSpan] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's name
        with self._changed:
            for resource in request.resource_spans:
                origin = _values(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.spans += [_span(origin, span) for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def until(self, count: int, *, trace_id: str = "", limit_s: float = 15.0) -> list[CollectedSpan]:
        """The spans of a trace, once there are so many; fails with what there is after `limit_s`."""

        def found() -> list[CollectedSpan]:
            return [span for span in self.spans if not trace_id or span.trace_id == trace_id]

        with self._changed:
            enough = self._changed.wait_for(lambda: len(found()) >= count, timeout=limit_s)
            assert enough, f"{len(found())} spans of {count}: {[(span.service, span.name) for span in found()]}"
            return sorted(found(), key=lambda span: span.start_ns)


def _span(origin: dict[str, Any], span: Any) -> CollectedSpan:
    return CollectedSpan(
        service=origin.get("service.name", ""),
        instance=origin.get("service.instance.id", ""),
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        kind=span.kind,
        failed=span.status.message if span.status.code == 2 else "",
        attributes=_values(span.attributes),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port, while the block runs."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(grace=None).wait()
