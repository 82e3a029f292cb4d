"""A worker's /metrics: what its engine process counted on the board, and its queues.

The engine core has no HTTP server of its own; it counts on the shared board, and this collector reads the
board when Prometheus asks. Nothing is copied in between, so the figures are those of this moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from engine.admission import Admission
from engine.protocol import Engine
from kv_transfer.board import Board, Counter
from slipstream.addresses import host_port
from slipstream.errors import StartupError
from slipstream.v1.registry_pb2 import Role

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
    (Counter.TRANSFERS_STAGED, "slipstream_kv_transfers_staged", "Transfers that took the slower staged way."),
)
_RESULTS = ((Counter.TRANSFERS_DONE, "done"), (Counter.TRANSFERS_FAILED, "failed"))
_OUTCOMES = (
    (Counter.HANDOFFS_TAKEN, "taken"),
    (Counter.HANDOFFS_RELEASED, "released"),
    (Counter.HANDOFFS_EXPIRED, "expired"),
)


class WorkerCollector:
    """Turns a worker's state into metric families."""

    def __init__(self, engine: Engine, board: Board, admission: Admission, role: str, worker_id: str) -> None:
        self._engine = engine
        self._board = board
        self._admission = admission
        self._labels = ("role", "worker")
        self._values = (role, worker_id)

    def collect(self) -> Iterable[Metric]:
        board = self._board
        for word, name, text in _COUNTERS:
            yield self._counter(name, text, board.counter(word))
        yield self._counter(
            "slipstream_kv_transfer_seconds",
            "Time spent in transfers, summed.",
            board.counter(Counter.TRANSFER_NS) / 1e9,
        )
        yield self._labelled(
            "slipstream_kv_transfers", "Transfers by result; a failed one is recomputed here.", "result", _RESULTS
        )
        yield self._labelled(
            "slipstream_kv_handoffs", "Leases on this worker's blocks by the way they ended.", "outcome", _OUTCOMES
        )
        load, capacity = self._engine.load(), self._engine.capacity()
        yield self._gauge("slipstream_kv_handoffs_held", "Leases open now.", load.handoffs_held)
        yield self._gauge("slipstream_worker_kv_blocks", "KV blocks in all.", capacity.blocks)
        yield self._gauge(
            "slipstream_worker_kv_blocks_used", "KV blocks held by requests and handoffs.", load.blocks_used
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

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=self._labels)
        family.add_metric(self._values, value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=self._labels)
        family.add_metric(self._values, value)
        return family

    def _labelled(self, name: str, text: str, label: str, words: Iterable[tuple[Counter, str]]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=(*self._labels, label))
        for word, value in words:
            family.add_metric((*self._values, value), self._board.counter(word))
        return family


class MetricsServer:
    """Serves /metrics in a thread of its own while the context is open; empty until `watch`."""

    def __init__(self, host: str, port: int, role: Role.ValueType, worker_id: str) -> None:
        self._role = "prefill" if role == Role.ROLE_PREFILL else "decode"
        self._worker_id = worker_id
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise StartupError(f"worker.metrics_port: cannot listen on {host}:{port}: {error.strerror}") from error
        self.url = f"http://{host_port(host, self._server.server_port)}/metrics"

    def watch(self, engine: Engine, board: Board, admission: Admission) -> None:
        """Report these from now on."""
        self._registry.register(WorkerCollector(engine, board, admission, self._role, self._worker_id))

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)
