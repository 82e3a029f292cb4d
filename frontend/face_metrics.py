"""What the faces measure of each request. Labels are bounded: the face, the endpoint, the model served, the status.

`face` is `http` or `grpc`; `endpoint` is a name from a fixed list, never a path a client made up; `model` is the one
this frontend serves, for what concerns a model, whatever a client asked for, and empty for the rest.

The same figures under the names of vLLM and Dynamo: `frontend.known_names`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from prometheus_client import Counter, Gauge, Histogram

from frontend.request_record import RequestRecord
from frontend.traffic_count import TRAFFIC

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_DURATION_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = tuple(float(1 << power) for power in range(18))

_WHERE = ("face", "endpoint", "model")
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
    "slipstream_frontend_requests_in_flight",
    "Requests being answered now. Compare with the workers' capacity.",
    _WHERE,
    multiprocess_mode="livesum",
)
AWAITING_FIRST_TOKEN = Gauge(
    "slipstream_frontend_requests_awaiting_first_token",
    "Requests of which no token has come yet, wherever they wait: here, in a worker's queue, or in prefill.",
    _WHERE,
    multiprocess_mode="livesum",
)
TASKS = Gauge(
    "slipstream_frontend_tasks",
    "Tasks of the process' event loop when this page was asked for. The same whenever it is idle, or some leak.",
    multiprocess_mode="livesum",
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
STAGE_S = Histogram(
    "slipstream_frontend_stage_seconds",
    "What a request spends in this process before it is with the workers: receive (until its body is read and "
    "checked), tokenize (template and tokenizer), admission (waiting to be let in), route (the decision).",
    ("stage",),
    buckets=_STAGE_S,
)
PROMPT_TOKENS = Counter(
    "slipstream_frontend_prompt_tokens_total", "Tokens of prompts accepted. Its rate is the load on prefill.", _WHERE
)
CACHED_PROMPT_TOKENS = Counter(
    "slipstream_frontend_cached_prompt_tokens_total",
    "Tokens of answered prompts that no worker had to compute. Its share of the prompt tokens is the KV hit rate.",
    _WHERE,
)
COMPLETION_TOKENS = Counter(
    "slipstream_frontend_completion_tokens_total", "Tokens generated. Its rate is the load on decode.", _WHERE
)
INPUT_TOKENS = Histogram(
    "slipstream_frontend_input_sequence_tokens", "Tokens of a request's prompt (ISL).", _WHERE, buckets=_TOKENS
)
OUTPUT_TOKENS = Histogram(
    "slipstream_frontend_output_sequence_tokens", "Tokens of a request's answers (OSL).", _WHERE, buckets=_TOKENS
)


@dataclass(frozen=True, slots=True)
class Where:
    """The face and endpoint a request came in by, and the model it is about."""

    face: str
    endpoint: str
    model: str = ""

    @property
    def labels(self) -> tuple[str, str, str]:
        return self.face, self.endpoint, self.model


class Series:
    """The series of one `Where`: looked up once, since each look-up costs more than a count."""

    __slots__ = (
        "awaiting",
        "between",
        "cached",
        "codes",
        "completion",
        "duration",
        "first",
        "in_flight",
        "input",
        "output",
        "prompt",
        "where",
    )

    def __init__(self, where: Where) -> None:
        labels = where.labels
        self.where = where
        self.in_flight = IN_FLIGHT.labels(*labels)
        self.duration = DURATION_S.labels(*labels)
        self.codes: dict[str, Counter] = {}
        self.awaiting = AWAITING_FIRST_TOKEN.labels(*labels)
        self.first = TIME_TO_FIRST_TOKEN_S.labels(*labels)
        self.between = INTER_TOKEN_LATENCY_S.labels(*labels)
        self.prompt = PROMPT_TOKENS.labels(*labels)
        self.cached = CACHED_PROMPT_TOKENS.labels(*labels)
        self.completion = COMPLETION_TOKENS.labels(*labels)
        self.input = INPUT_TOKENS.labels(*labels)
        self.output = OUTPUT_TOKENS.labels(*labels)

    def answered(self, code: str) -> None:
        """A request ended with this status."""
        counter = self.codes.get(code)
        if counter is None:
            counter = self.codes[code] = REQUESTS.labels(*self.where.labels, code)
        counter.inc()


@lru_cache(maxsize=64)
def series(where: Where) -> Series:
    """The series of a place; there are about ten places."""
    return Series(where)


@lru_cache(maxsize=16)
def stage_series(stage: str) -> Histogram:
    """The series of a stage."""
    return STAGE_S.labels(stage)


class TokenTimes:
    """Time to first token and between tokens of one request; of each of its answers when there are several.

    Args:
        record: of the request; it is told of the first token and of the number of tokens.
    """

    def __init__(self, where: Where, record: RequestRecord, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._record = record
        self._last_s: dict[int, float] = {}
        own = series(where)
        self._first, self._between, self._tokens = own.first, own.between, own.completion
        self._awaiting = own.awaiting
        self._awaiting.inc()

    def arrived(self, index: int, tokens: int) -> None:
        """`tokens` tokens of answer `index` came in together."""
        if not tokens:
            return
        now_s = self._clock()
        last_s = self._last_s.get(index)
        record = self._record
        if last_s is not None:
            self._between.observe((now_s - last_s) / tokens)
        elif not self._last_s:
            record.first_token_s = now_s
            self._first.observe(now_s - record.started_s)
            TRAFFIC.first_token(record)
            self._awaiting.dec()
        self._last_s[index] = now_s
        record.last_token_s = now_s
        record.completion_tokens += tokens
        self._tokens.inc(tokens)

    def close(self) -> None:
        """No more tokens come."""
        if not self._last_s:
            self._awaiting.dec()
