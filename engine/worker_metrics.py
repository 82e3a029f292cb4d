"""A worker's /metrics: what its engine process counted on the board, and its queues.

The engine core has no HTTP server of its own; it counts on the shared board, and this collector reads the
board when Prometheus asks. Nothing is copied in between, so the figures are those of this moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from engine.admission import Admission
from engine.observed_call import STAGE_S
from engine.protocol import Engine
from kv_transfer.accounts import BYTES_BY_WAY, FAILURES, REFUSED
from kv_transfer.board import Board, Counter
from slipstream import metric_names
from slipstream.errors import StartupError
from slipstream.metric_names import KnownNames
from slipstream.metrics_server import MetricsHttpServer
from slipstream.security.expiry import CertificateCollector
from slipstream.v1.registry_pb2 import Role, TransferPath

_COUNTERS = (
    (
        Counter.PROMPT_TOKENS_COMPUTED,
        "slipstream_worker_prompt_tokens_computed",
        "Prompt tokens that went through the model. On a decode worker at most one a request, unless transfers fail.",
    ),
    (
        Counter.PROMPT_TOKENS_CACHED,
        "slipstream_worker_prompt_tokens_cached",
        "Prompt tokens found in this worker's prefix cache.",
    ),
    (
        Counter.PROMPT_TOKENS_RECEIVED,
        "slipstream_worker_prompt_tokens_received",
        "Prompt tokens whose KV came from a prefill worker.",
    ),
    (Counter.BLOCKS_RECEIVED, "slipstream_kv_transfer_blocks", "KV blocks received."),
    (
        Counter.BYTES_RECEIVED,
        "slipstream_kv_transfer_bytes",
        "KV bytes received: always the blocks received times the bytes of a block.",
    ),
    (
        Counter.WIRE_BYTES,
        "slipstream_kv_transfer_wire_bytes",
        "Bytes that crossed for them: fewer when compressed, more when spans were sent again.",
    ),
    (
        Counter.SPANS_RESENT,
        "slipstream_kv_transfer_spans_resent",
        "Spans that did not fit their digest and were sent again. Anything but 0 is worth a look at the way.",
    ),
    (
        Counter.HANDOFFS_OPENED,
        "slipstream_kv_handoffs_opened",
        "Leases on this worker's blocks that began. Each that has ended is one of slipstream_kv_handoffs.",
    ),
    (
        Counter.HANDOFFS_RESET,
        "slipstream_kv_handoffs_reset",
        "Times a preemption took blocks away while they were being sent; they are computed and sent once more.",
    ),
    (
        Counter.PREEMPTIONS,
        "slipstream_worker_preemptions",
        "Requests that were put back because the KV blocks did not suffice; what they had is computed again. Many: "
        "raise worker.kv_cache_bytes, or send fewer requests at a time.",
    ),
)
_PROMPT_TOKENS = (Counter.PROMPT_TOKENS_COMPUTED, Counter.PROMPT_TOKENS_CACHED, Counter.PROMPT_TOKENS_RECEIVED)
_SECONDS = (
    (
        Counter.TRANSFER_NS,
        "slipstream_kv_transfer_seconds",
        "Time spent in transfers, summed: digesting, sending, copying and checking.",
    ),
    (
        Counter.EXPOSED_NS,
        "slipstream_kv_transfer_exposed_seconds",
        "The part of the wait for blocks that a client felt: decode waiting after prefill's last token.",
    ),
    (
        Counter.HIDDEN_NS,
        "slipstream_kv_transfer_hidden_seconds",
        "The part of the time spent in transfers that passed while the prompt was still being computed.",
    ),
)
_BYTES_BY_PATH = {word: path for path, word in BYTES_BY_WAY.items()}
_CAUSES = {word: cause for cause, word in FAILURES.items() if word is not Counter.FAILED_CANCELLED} | {
    Counter.FAILED_OTHER: "other"
}
_REFUSED = {word: reason for reason, word in REFUSED.items()}
_RESULTS = {
    "done": (Counter.TRANSFERS_DONE,),
    "failed": tuple(_CAUSES),
    "cancelled": (Counter.FAILED_CANCELLED,),
}
_OUTCOMES = {
    Counter.HANDOFFS_TAKEN: "taken",
    Counter.HANDOFFS_RELEASED: "released",
    Counter.HANDOFFS_EXPIRED: "expired",
    Counter.HANDOFFS_NOT_CACHED: "not_cached",
    Counter.HANDOFFS_ABORTED: "aborted",
}
Paths = Callable[[], Sequence[TransferPath]]
"""What this worker has measured. Called from the thread that serves /metrics."""


class WorkerCollector:
    """Turns a worker's state into metric families."""

    def __init__(
        self,
        engine: Engine,
        board: Board,
        admission: Admission,
        paths: Paths,
        role: Callable[[], str],
        worker_id: str,
    ) -> None:
        self._engine = engine
        self._paths = paths
        self._board = board
        self._admission = admission
        self._labels = ("role", "worker")
        self._role = role
        self._worker_id = worker_id

    @property
    def _values(self) -> tuple[str, str]:
        return self._role(), self._worker_id

    def collect(self) -> Iterable[Metric]:
        yield from self._transfers()
        yield from self._measured_paths()
        yield from self._requests()
        yield from self._stages()

    def _transfers(self) -> Iterable[Metric]:
        board = self._board
        for word, name, text in _COUNTERS:
            yield self._counter(name, text, board.counter(word))
        yield self._counter(
            "slipstream_worker_prompt_tokens",
            "Tokens of prompts taken up: computed, found in the prefix cache, or received.",
            sum(map(board.counter, _PROMPT_TOKENS)),
        )
        for word, name, text in _SECONDS:
            yield self._counter(name, text, board.counter(word) / 1e9)
        yield self._labelled(
            "slipstream_kv_transfer_bytes_by_path",
            "KV bytes received, by the way they took.",
            "path",
            {path: board.counter(word) for word, path in _BYTES_BY_PATH.items()},
        )
        yield self._labelled(
            "slipstream_kv_transfers",
            "Transfers by result; after a failed one the prompt is computed here.",
            "result",
            {result: sum(map(board.counter, words)) for result, words in _RESULTS.items()},
        )
        yield self._labelled(
            "slipstream_kv_transfer_failures",
            "Failed transfers by cause.",
            "cause",
            {cause: board.counter(word) for word, cause in _CAUSES.items()},
        )
        yield self._labelled(
            "slipstream_kv_refused",
            "Connections, handoffs and messages that this worker's transfer agent refused, by reason. not_registered, "
            "bad_identity and bad_token: somebody wants blocks who is not meant to have them.",
            "reason",
            {reason: board.counter(word) for word, reason in _REFUSED.items()},
        )
        yield self._labelled(
            "slipstream_kv_handoffs",
            "Leases on this worker's blocks by the way they ended.",
            "outcome",
            {outcome: board.counter(word) for word, outcome in _OUTCOMES.items()},
        )

    def _measured_paths(self) -> Iterable[Metric]:
        labels = (*self._labels, "peer", "transport", "detail")
        bandwidth = GaugeMetricFamily(
            "slipstream_kv_path_bandwidth_bytes_per_second",
            "Bandwidth of the way from a peer to this worker, as measured when they met.",
            labels=labels,
        )
        latency = GaugeMetricFamily(
            "slipstream_kv_path_latency_seconds", "Latency of that way, of one small block.", labels=labels
        )
        broken = GaugeMetricFamily(
            "slipstream_kv_path_broken", "1 for each peer from which no way works.", labels=(*self._labels, "peer")
        )
        for path in self._paths():
            if path.error:
                broken.add_metric((*self._values, path.peer_worker_id), 1)
                continue
            values = (*self._values, path.peer_worker_id, path.transport, path.detail)
            bandwidth.add_metric(values, path.bytes_per_s)
            latency.add_metric(values, path.latency_s)
        yield from (bandwidth, latency, broken)

    def _requests(self) -> Iterable[Metric]:
        load, capacity = self._engine.load(), self._engine.capacity()
        yield self._gauge("slipstream_kv_handoffs_held", "Leases open now.", load.handoffs_held)
        yield self._gauge("slipstream_worker_kv_blocks", "KV blocks in all.", capacity.blocks)
        yield self._gauge(
            "slipstream_worker_kv_blocks_used", "KV blocks held by requests and handoffs.", load.blocks_used
        )
        yield self._gauge(
            "slipstream_worker_kv_usage_ratio",
            "The part of the KV blocks that requests and handoffs hold, 0 to 1. Near 1 for long: requests wait for "
            "memory; add workers, or raise worker.kv_cache_bytes.",
            load.blocks_used / capacity.blocks if capacity.blocks else 0.0,
        )
        yield self._gauge("slipstream_worker_kv_block_bytes", "Bytes of a KV block, all layers.", capacity.block_bytes)
        yield self._gauge("slipstream_worker_requests_running", "Requests in the engine's batch.", load.running)
        yield self._gauge("slipstream_worker_requests_waiting", "Requests queued in the engine.", load.waiting)
        yield self._gauge("slipstream_worker_requests_open", "Calls open on this worker.", self._admission.open_count)
        yield self._counter(
            "slipstream_worker_requests_refused", "Calls refused: draining or full.", self._admission.refused_total
        )
        yield self._counter("slipstream_worker_requests", "Requests finished or begun.", load.requests_total)
        yield self._counter(
            "slipstream_worker_tokens",
            "Prompt tokens computed (prefill), tokens generated (decode).",
            load.tokens_total,
        )

    def _stages(self) -> Iterable[Metric]:
        own = dict(zip(self._labels, self._values, strict=True))
        for family in STAGE_S.collect():
            family.samples = [sample._replace(labels=own | sample.labels) for sample in family.samples]
            yield family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=self._labels)
        family.add_metric(self._values, value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=self._labels)
        family.add_metric(self._values, value)
        return family

    def _labelled(self, name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=(*self._labels, label))
        for word, value in values.items():
            family.add_metric((*self._values, word), value)
        return family


class MetricsServer:
    """Serves /metrics in a thread of its own while the context is open; empty until `watch`.

    Attributes:
        role: that the worker has now; a label of all its figures.
    """

    def __init__(self, host: str, port: int, role: Role.ValueType, worker_id: str, *, model: str) -> None:
        self.role = role
        self._worker_id = worker_id
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(CertificateCollector())
        try:
            page = KnownNames(self._registry, metric_names.WORKER, model=model)
            self._server = MetricsHttpServer(host, port, make_wsgi_app(page))
        except OSError as error:
            raise StartupError(f"worker.metrics_port: cannot listen on {host}:{port}: {error.strerror}") from error
        self.url = self._server.url

    def watch(self, engine: Engine, board: Board, admission: Admission, paths: Paths) -> None:
        """Report these from now on."""
        self._registry.register(WorkerCollector(engine, board, admission, paths, self._role_name, self._worker_id))

    def add(self, families: Collector) -> None:
        """Report these too."""
        self._registry.register(families)

    def labels(self) -> tuple[str, str]:
        """The values of `role` and `worker`."""
        return self._role_name(), self._worker_id

    def _role_name(self) -> str:
        return "prefill" if self.role == Role.ROLE_PREFILL else "decode"

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
