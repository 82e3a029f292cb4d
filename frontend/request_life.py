"""A request from its arrival to its end, as it is observed: counted, measured, logged, traced.

    with observed(where, request_id, method=..., path=..., headers=..., clock=clock) as record:
        ...
        record.status = "200"

    with stage("tokenize"):
        ...

One line in the log and one in the access log a request, both at its end; nothing here runs for each token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog

from frontend import access_log, face_metrics
from frontend.face_metrics import Where
from frontend.request_record import CURRENT, RequestRecord, current, current_span
from frontend.router import Route
from frontend.traffic_count import TRAFFIC
from slipstream import telemetry, tracing
from slipstream.tracing import Span

log = telemetry.get_logger(__name__)

SESSION_HEADER = "x-session-id"
ROUTE_HEADER = "x-slipstream-route"
"""Why the request went to its workers, in a word: a header over HTTP, trailing metadata over gRPC. `slipstream explain`
has the rest."""
_LONGEST_NAME = 200


@contextmanager
def observed(
    where: Where,
    request_id: str,
    *,
    method: str,
    path: str,
    headers: Mapping[str, str],
    clock: Callable[[], float],
) -> Iterator[RequestRecord]:
    """The record of a request, current while the block runs; the block sets its `status`.

    Args:
        headers: with lower-case names.
    """
    record = RequestRecord(request_id, method, path[:_LONGEST_NAME], clock(), time.time_ns())
    record.session = headers.get(SESSION_HEADER, "")[:_LONGEST_NAME]
    if where.model and tracing.enabled():
        record.span = tracing.start(f"{method} {where.endpoint}", headers, start_ns=record.started_ns)
    bound = {"request_id": request_id}
    if record.span.trace_id:
        bound["trace_id"] = record.span.trace_id
    in_flight = face_metrics.series(where).in_flight
    in_flight.inc()
    token = CURRENT.set(record)
    try:
        with structlog.contextvars.bound_contextvars(**bound):
            try:
                yield record
            finally:
                _ended(where, record, clock())
    finally:
        CURRENT.reset(token)
        in_flight.dec()


def received(clock: Callable[[], float]) -> None:
    """The request was read and understood: ends its first stage."""
    record = current()
    if record is None:
        return
    now_s = clock()
    face_metrics.stage_series("receive").observe(now_s - record.started_s)
    if record.span.recording:
        record.span.child("receive", start_ns=record.started_ns).end(record.unix_ns(now_s))


def note_route(route: Route) -> None:
    """A sequence of the current request goes to these workers."""
    record = current()
    if record is not None:
        prefill = route.prefill.worker_id if route.prefill is not None else ""
        record.note_route(prefill, route.decode.worker_id, route.reason)


def note_broken(where: Where, code: str) -> None:
    """A streamed answer ended in an error, after its status was sent."""
    face_metrics.BROKEN_STREAMS.labels(*where.labels, code).inc()
    record = current()
    if record is not None:
        record.error = code


@contextmanager
def stage(name: str) -> Iterator[Span]:
    """A stage of the current request, measured, and a span of its trace."""
    span = current_span().child(name)
    began_s = time.perf_counter()
    try:
        yield span
    except Exception as error:
        span.fail(type(error).__name__)
        raise
    finally:
        face_metrics.stage_series(name).observe(time.perf_counter() - began_s)
        span.end()


def _ended(where: Where, record: RequestRecord, now_s: float) -> None:
    total_s = now_s - record.started_s
    own = face_metrics.series(where)
    own.answered(record.status)
    own.duration.observe(total_s)
    if record.prompt_tokens:
        own.input.observe(record.prompt_tokens)
        own.output.observe(record.completion_tokens)
        own.cached.inc(record.cached_tokens)
    if where.model:
        TRAFFIC.ended(where.model, record)
        access_log.write(record, total_s)
        if record.span.recording:
            _end_trace(record, now_s)
    else:
        log.debug("request", method=record.method, path=record.path, status=record.status, total_s=round(total_s, 6))


def _end_trace(record: RequestRecord, now_s: float) -> None:
    span = record.span
    if record.first_token_s is not None:
        stream = span.child("stream", start_ns=record.unix_ns(record.first_token_s))
        stream.set("slipstream.tokens", record.completion_tokens)
        stream.end(record.unix_ns(now_s))
    for name, value in (
        ("slipstream.request_id", record.request_id),
        ("slipstream.status", record.status),
        ("slipstream.route", record.route),
        ("slipstream.fallback", record.fallback),
        ("session.id", record.session),
        ("gen_ai.request.model", record.model),
        ("gen_ai.usage.input_tokens", record.prompt_tokens),
        ("gen_ai.usage.output_tokens", record.completion_tokens),
    ):
        if value:
            span.set(name, value)
    if record.status not in ("200", "OK") or record.error:
        span.fail(record.error or record.status)
    span.end(record.unix_ns(now_s))
