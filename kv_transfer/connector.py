"""The KV connector that vLLM loads (`KVTransferConfig(kv_connector="SlipstreamConnector", ...)`).

vLLM makes one instance in its scheduler and one in each worker: with tensor parallelism there is a worker for each
rank, in a process of its own, and each has a transfer agent for its part of the KV heads. This class only joins vLLM's
hooks to `SchedulerSide` and `WorkerSide`, where the behaviour is. Its settings come in `kv_connector_extra_config`:

    board       path of the lease board, made by the worker's service on this node
    owner_pid   that service; the engine ends itself when it is gone
    owner_key   public key in hex of the first node's; it tells the transfer agents who is registered
    host_id     equal for workers that share memory
    host        address the transfer agent listens on
    transfer    the settings section `transfer`, as a dict
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.v1.request import RequestStatus

from kv_transfer import agent_start as agents
from kv_transfer import layout as layouts
from kv_transfer.accounts import TransferReport
from kv_transfer.agent_start import Endpoint
from kv_transfer.board import Board, Counter, Outcome
from kv_transfer.kv_memory import KvMemory
from kv_transfer.layout import Layout
from kv_transfer.model_identity import weights_digest
from kv_transfer.process_ties import belong_to, end_with
from kv_transfer.scheduler_side import SchedulerSide, Step
from kv_transfer.worker_side import Results, WorkerSide, regions_by_layer
from slipstream.errors import StartupError
from slipstream.worker_settings import TransferSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to worker, once a step; None once the worker has begun it."""

    step: Step | None


@dataclass
class StepReports(KVConnectorWorkerMetadata):
    """Worker to scheduler, once a step: what `worker_side.Results` says, by request id and rank."""

    started: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    reports: dict[str, dict[int, TransferReport]] = field(default_factory=dict)
    ended: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Results, rank: int) -> StepReports:
        return cls(
            {request_id: {rank: begun} for request_id, begun in results.started.items()},
            {request_id: {rank: report} for request_id, report in results.reports.items()},
            dict(results.ended),
        )

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReports:
        assert isinstance(other, StepReports)
        for request_id, begun in other.started.items():
            self.started.setdefault(request_id, {}).update(begun)
        for request_id, reports in other.reports.items():
            self.reports.setdefault(request_id, {}).update(reports)
        for request_id, outcome in other.ended.items():
            self.ended[request_id] = max(outcome, self.ended.get(request_id, outcome))
        return self


@dataclass
class RankEndpoint(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: where a rank's process and transfer agent are, and how much of each block it has.

    Attributes:
        fingerprint: of what decides whether KV blocks can be exchanged; the same on all ranks.
    """

    pid: int
    endpoint: Endpoint
    block_tokens: int
    block_bytes: int
    fingerprint: str


class SlipstreamConnector(KVConnectorBase_V1):
    """See the module's docstring; the hooks' contract is vLLM's `KVConnectorBase_V1`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        parallel = vllm_config.parallel_config
        self._rank, self._ranks = parallel.rank, parallel.tensor_parallel_size
        if parallel.world_size != self._ranks:
            raise StartupError(
                f"Slipstream's KV transfer knows tensor parallelism only: {parallel.world_size} processes an engine, "
                f"but a tensor-parallel size of {self._ranks}; set pipeline and context parallel sizes to 1"
            )
        config = self._kv_transfer_config
        self._board = Board.open(Path(config.get_from_extra_config("board", "")))
        self._settings = TransferSettings(**config.get_from_extra_config("transfer", {}))
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._blocks = kv_cache_config.num_blocks
        self._step_reports: StepReports | None = None
        self._endpoint: RankEndpoint | None = None
        if role is KVConnectorRole.SCHEDULER:
            belong_to(int(config.get_from_extra_config("owner_pid", 0)))
            self._scheduler = SchedulerSide(
                self._board,
                block_tokens=vllm_config.cache_config.block_size,
                lease_s=self._settings.lease_s,
                ranks=self._ranks,
            )
        elif self._ranks > 1:
            belong_to(os.getppid())

    @property
    def requires_kv_delivery(self) -> bool:
        # Whichever role the worker has now: it may be given the other one at any time.
        return True

    # -- scheduler ----------------------------------------------------------------------------------------

    @property
    def _sched(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._sched.bind_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._sched.note_new(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self._sched.receivable_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self._sched.start_load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return StepMetadata(self._sched.take_step(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, StepReports):
            self._sched.take_started(meta.started)
            self._sched.take_reports(meta.reports)
            self._sched.take_ended(meta.ended)
        self._sched.release(connector_output.finished_sending or set())

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        ranks = [metadata[rank] for rank in sorted(metadata)]
        ends = [end for end in ranks if isinstance(end, RankEndpoint)]
        if len({end.fingerprint for end in ends}) > 1:
            raise StartupError("the ranks of this worker differ in model, number format, block size or kind of CPU")
        agents.publish(self._board, [end.endpoint for end in ends])
        if self._ranks > 1:
            end_with({end.pid for end in ends})
        self._board.set_gauge(Counter.BLOCK_TOKENS, ends[0].block_tokens)
        self._board.set_gauge(Counter.BLOCK_BYTES, sum(end.block_bytes for end in ends))

    def take_events(self) -> Iterable[Any]:
        self._sched.publish_gauges()  # the last hook of a step: blocks freed by this step are free by now
        return ()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        completed = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        return self._sched.finish(request, completed=completed)

    # -- worker -------------------------------------------------------------------------------------------

    @property
    def _work(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        cache_config, model = self._vllm_config.cache_config, self._vllm_config.model_config
        views = layouts.block_views(kv_caches, self._blocks)
        memory = KvMemory(views, dtype=str(next(iter(kv_caches.values())).dtype).removeprefix("torch."))
        layout = Layout(
            layouts.fingerprint(_facts(self._vllm_config, memory.piece_bytes)),
            self._blocks,
            cache_config.block_size,
            memory.regions,
            self._rank,
            self._ranks,
            model.get_total_num_kv_heads(),
            layouts.by_head(kv_caches, self._blocks, model.get_num_kv_heads(self._vllm_config.parallel_config)),
        )
        config = self._kv_transfer_config
        began_ns = time.monotonic_ns()
        agent, endpoint = agents.start(
            memory,
            layout,
            self._board,
            self._settings,
            host_id=config.get_from_extra_config("host_id", ""),
            host=config.get_from_extra_config("host", "127.0.0.1"),
            owner=bytes.fromhex(config.get_from_extra_config("owner_key", "")),
        )
        self._endpoint = RankEndpoint(
            os.getpid(), endpoint, layout.block_tokens, layout.block_bytes, layout.fingerprint
        )
        if self._rank == 0:  # every word of the board has one writer
            self._board.add(Counter.START_TRANSFER_NS, time.monotonic_ns() - began_ns)
        names = layouts.in_order(kv_caches)
        self._worker = WorkerSide(
            agent,
            memory,
            regions=regions_by_layer(names, len(memory.regions)),
            by_layer=memory.on_host,
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._endpoint

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # The first hook of every step, before anything is written: what it takes away is fenced off here.
        assert isinstance(kv_connector_metadata, StepMetadata)
        self._begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        self._begin(metadata)

    def _begin(self, metadata: StepMetadata) -> None:
        step, metadata.step = metadata.step, None  # both hooks see the same metadata; a step begins once
        if step is not None:
            self._work.begin(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests run only once all their blocks are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self._work.layer_done(layer_name)

    def wait_for_save(self) -> None:
        if not self._work.by_layer:
            torch.accelerator.synchronize()  # the step's kernels have only been queued
        self._work.forward_done()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = self._work.poll()
        self._step_reports = StepReports.of(results, self._rank) if not results.empty else None
        return KVConnectorTransferResults(
            finished_sending=set(results.ended), finished_recving=results.received, failed_recving=results.failed
        )

    def build_connector_worker_meta(self) -> StepReports | None:
        reports, self._step_reports = self._step_reports, None
        return reports

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()


def _facts(vllm_config: VllmConfig, piece_bytes: list[int]) -> dict[str, object]:
    model = vllm_config.model_config
    heads = model.get_num_kv_heads(vllm_config.parallel_config)  # of one rank
    return {
        "head_pieces": [size // heads for size in piece_bytes],
        "architecture": model.hf_config.to_json_string(use_diff=False),
        "name": model.served_model_name,
        "weights": weights_digest(Path(model.model)),
        "dtype": str(model.dtype),
        "kv_dtype": vllm_config.cache_config.cache_dtype,
        "block_tokens": vllm_config.cache_config.block_size,
        "device": str(vllm_config.device_config.device_type),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
