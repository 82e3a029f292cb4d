"""The KV connector that vLLM loads (`KVTransferConfig(kv_connector="SlipstreamConnector", ...)`).

vLLM makes one instance in its scheduler and one in each worker. This class only joins vLLM's hooks to
`SchedulerSide` and `WorkerSide`, where the behaviour is. Its settings come in `kv_connector_extra_config`:

    board       path of the lease board, made by the worker's service
    owner_pid   that service; the engine ends itself when it is gone
    prefill     true on prefill workers
    mode        shm transport: auto, direct or staged
    timeout_s   longest a transfer may take
    lease_s     how long blocks are held for a decode worker without a renewal
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.v1.request import RequestStatus

from kv_transfer.board import Board
from kv_transfer.model_identity import weights_digest
from kv_transfer.scheduler_side import Hold, Load, SchedulerSide, TransferReport
from kv_transfer.worker_side import WorkerSide
from slipstream.errors import StartupError

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
    """Scheduler to worker, once a step."""

    loads: list[Load] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)


@dataclass
class StepReports(KVConnectorWorkerMetadata):
    """Worker to scheduler, once a step."""

    reports: dict[str, TransferReport] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReports:
        assert isinstance(other, StepReports)
        return StepReports({**self.reports, **other.reports})


class SlipstreamConnector(KVConnectorBase_V1):
    """See the module's docstring; the hooks' contract is vLLM's `KVConnectorBase_V1`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if vllm_config.parallel_config.world_size != 1:
            raise StartupError("Slipstream's KV transfer runs with one GPU a worker: set tensor and pipeline size to 1")
        config = self._kv_transfer_config
        self._prefill = bool(config.get_from_extra_config("prefill", False))
        board = Board.open(Path(config.get_from_extra_config("board", "")))
        block_tokens = vllm_config.cache_config.block_size
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            _belong_to(int(config.get_from_extra_config("owner_pid", 0)))
            self._scheduler = SchedulerSide(
                board, block_tokens=block_tokens, lease_s=float(config.get_from_extra_config("lease_s", 30.0))
            )
        else:
            self._worker = WorkerSide(
                board,
                blocks=kv_cache_config.num_blocks,
                block_tokens=block_tokens,
                facts=_facts(vllm_config),
                mode=config.get_from_extra_config("mode", "auto"),
                timeout_s=float(config.get_from_extra_config("timeout_s", 10.0)),
            )
        self._step_reports: dict[str, TransferReport] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        return self._prefill

    # -- scheduler ----------------------------------------------------------------------------------------

    @property
    def _sched(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._sched.bind_pool(gpu_block_pool)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self._sched.receivable_tokens(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self._sched.start_load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return StepMetadata(*self._sched.take_step(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, StepReports):
            self._sched.take_reports(meta.reports)
        self._sched.release(connector_output.finished_sending or set())

    def take_events(self) -> Iterable[Any]:
        self._sched.publish_gauges()  # the last hook of a step: blocks freed by this step are free by now
        return ()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        completed = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        return self._sched.finish(request, block_ids, completed=completed)

    # -- worker -------------------------------------------------------------------------------------------

    @property
    def _work(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._work.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # The first hook of a step with work in it: transfers run beside the forward pass instead of after it.
        self._begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._begin(self._get_connector_metadata())

    def _begin(self, metadata: KVConnectorMetadata) -> None:
        assert isinstance(metadata, StepMetadata)
        loads, holds = metadata.loads, metadata.holds
        metadata.loads, metadata.holds = [], []  # both hooks see the same metadata; each job starts once
        self._work.start(loads, holds)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests run only once all their blocks are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are read from the KV cache itself."""

    def wait_for_save(self) -> None:
        """Nothing is being saved."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = self._work.poll()
        self._step_reports = results.reports
        return KVConnectorTransferResults(
            finished_sending=results.sent, finished_recving=results.received, failed_recving=results.failed
        )

    def build_connector_worker_meta(self) -> StepReports | None:
        reports, self._step_reports = self._step_reports, {}
        return StepReports(reports) if reports else None

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()


def _facts(vllm_config: VllmConfig) -> dict[str, object]:
    model = vllm_config.model_config
    return {
        "architecture": model.hf_config.to_json_string(use_diff=False),
        "name": model.served_model_name,
        "weights": weights_digest(Path(model.model)),
        "dtype": str(model.dtype),
        "kv_dtype": vllm_config.cache_config.cache_dtype,
        "block_tokens": vllm_config.cache_config.block_size,
        "device": str(vllm_config.device_config.device_type),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _belong_to(owner_pid: int) -> None:
    """Tie this engine process to the service that owns it: it ends when the service has died, even by SIGKILL.

    A thread that sleeps in poll() on a pidfd: exact, and without cost. (PR_SET_PDEATHSIG would fire at the
    end of the thread, not of the process, that started this one.) A terminal's Ctrl-C is the service's to
    handle: it drains first.
    """
    if not owner_pid or owner_pid == os.getpid():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fd = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()
