"""What the faces measure of each request. Labels are bounded: the face, the endpoint, the status.

`face` is `http` or `grpc`; `endpoint` is a name from a fixed list, never a path a client made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_DURATION_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_WHERE = ("face", "endpoint")
REQUESTS = Counter(
    "slipstream_frontend_requests_total",
    "Requests answered, by status: an HTTP status or a gRPC status name. A rising rate of 5xx needs a look.",
    (*_WHERE, "code"),
)
BROKEN_STREAMS = Counter(
    "slipstream_frontend_broken_streams_total",
    "Streamed answers that ended in an error after they had begun, by error code. Their status was a success.",
    (*_WHERE, "code"),
)
IN_FLIGHT = Gauge(
    "slipstream_frontend_requests_in_flight", "Requests being answered now. Compare with the workers' capacity.", _WHERE
)
DURATION_S = Histogram(
    "slipstream_frontend_request_duration_seconds",
    "From the request's arrival to the last byte of its answer.",
    _WHERE,
    buckets=_DURATION_S,
)
TIME_TO_FIRST_TOKEN_S = Histogram(
    "slipstream_frontend_time_to_first_token_seconds",
    "From the request's arrival to its first token: queueing, prefill and handoff. High: add prefill workers.",
    _WHERE,
    buckets=_LATENCY_S,
)
INTER_TOKEN_LATENCY_S = Histogram(
    "slipstream_frontend_inter_token_latency_seconds",
    "Between tokens of one answer; tokens that arrive together share their wait. High: add decode workers.",
    _WHERE,
    buckets=_LATENCY_S,
)
PROMPT_TOKENS = Counter(
    "slipstream_frontend_prompt_tokens_total", "Tokens of prompts accepted. Its rate is the load on prefill.", _WHERE
)
COMPLETION_TOKENS = Counter(
    "slipstream_frontend_completion_tokens_total", "Tokens generated. Its rate is the load on decode.", _WHERE
)


@dataclass(frozen=True, slots=True)
class Where:
    """The face and endpoint a request came in by."""

    face: str
    endpoint: str


@contextmanager
def in_flight(where: Where, clock: Callable[[], float]) -> Iterator[None]:
    """Count a request as being answered, and measure how long that took."""
    started_s = clock()
    gauge = IN_FLIGHT.labels(where.face, where.endpoint)
    gauge.inc()
    try:
        yield
    finally:
        gauge.dec()
        DURATION_S.labels(where.face, where.endpoint).observe(clock() - started_s)


class TokenTimes:
    """Time to first token and between tokens of one request; of each of its answers when there are several."""

    def __init__(self, where: Where, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_s = clock()
        self._last_s: dict[int, float] = {}
        labels = (where.face, where.endpoint)
        self._first = TIME_TO_FIRST_TOKEN_S.labels(*labels)
        self._between = INTER_TOKEN_LATENCY_S.labels(*labels)
        self._tokens = COMPLETION_TOKENS.labels(*labels)

    def arrived(self, index: int, tokens: int) -> None:
        """`tokens` tokens of answer `index` came in together."""
        if not tokens:
            return
        now_s = self._clock()
        last_s = self._last_s.get(index)
        if last_s is not None:
            self._between.observe((now_s - last_s) / tokens)
        elif not self._last_s:
            self._first.observe(now_s - self._started_s)
        self._last_s[index] = now_s
        self._tokens.inc(tokens)
