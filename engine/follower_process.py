"""The process of a node that follows: ranks of a worker whose scheduler and service are on the first node.

It neither registers nor serves requests: to the cluster the first node is the worker. What it has is /metrics, for
as long as it lives: the process' own figures, and whether its ranks are loaded.

The order at the start: take the port of /metrics, join the leader (`engine.node_tie`), load the ranks. It ends with a
failure when the leader or a rank is gone. One that is to stop says so to the leader, which lets open requests finish
first: they need these ranks.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from prometheus_client.core import GaugeMetricFamily, Metric

from engine import host_id
from engine.loading import checked_model, end_despite_load, first_of, in_daemon_thread, own_board
from engine.node_group import NodeGroup
from engine.node_tie import Follower, facts_of, joined
from engine.worker_metrics import MetricsServer
from kv_transfer.board import Board
from slipstream import telemetry
from slipstream.errors import EngineDeadError, SlipstreamError, StartupError
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role

if TYPE_CHECKING:
    from engine.vllm_ranks import VllmRanks

log = telemetry.get_logger(__name__)

_CHECK_S = 0.5
# What the leader takes beside `worker.drain_timeout_s` to end.
_LEADER_END_S = 15.0
_BOARD_SLOTS = 1  # nobody holds leases here


def run(settings: Settings, group: NodeGroup, role: Role.ValueType, worker_id: str) -> None:
    """Run this node's ranks until the worker ends.

    Raises:
        StartupError: the port is taken, the leader is not there or does not take this node, the model cannot be loaded.
        EngineDeadError: the leader or a rank is gone; this process should end with a failure, to be started again.
    """
    follower = _FollowerProcess(settings, group, role, worker_id)
    try:
        uvloop.run(follower.serve())
    except SlipstreamError as error:
        if not follower.load_abandoned:
            raise
        log.error("worker_failed", error=error.message)
        end_despite_load(1)
    if follower.load_abandoned:
        end_despite_load(0)


class _ReadyCollector:
    """Whether this node's ranks are loaded, for /metrics."""

    def __init__(self, ready: Callable[[], bool], labels: Callable[[], tuple[str, str]]) -> None:
        self._ready = ready
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "slipstream_worker_node_ready",
            "1 while the ranks on this node of a worker are loaded. Only on nodes that follow: the first node's "
            "figures are those of the worker.",
            labels=("role", "worker"),
        )
        family.add_metric(self._labels(), float(self._ready()))
        yield family


class _FollowerProcess:
    def __init__(self, settings: Settings, group: NodeGroup, role: Role.ValueType, worker_id: str) -> None:
        self._settings = settings
        self._group = group
        self._role = role
        self._worker_id = worker_id
        self._stop = asyncio.Event()
        self._ranks: VllmRanks | None = None
        self.load_abandoned = False

    async def serve(self) -> None:
        settings, worker = self._settings, self._settings.worker
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        fetching = in_daemon_thread(lambda: checked_model(settings))
        # No deadline: it downloads, and each of the hub client's waits has one.
        if not await first_of(fetching, self._stop):
            self.load_abandoned = True
            return
        folder = fetching.result()
        served_name = settings.served_model_name or folder.served_name
        async with AsyncExitStack() as owned:
            metrics = owned.enter_context(
                MetricsServer(worker.host, worker.metrics_port, self._role, self._worker_id, model=served_name)
            )
            metrics.add(_ReadyCollector(lambda: self._ranks is not None and self._ranks.alive, metrics.labels))
            tie = await self._joined(owned, await asyncio.to_thread(facts_of, settings, folder))
            if tie is None:  # stopped while waiting
                return
            shared = tie.shared
            board = owned.enter_context(
                own_board(_BOARD_SLOTS, epoch=shared.epoch, seed=shared.seed, node=self._group.rank)
            )
            if await owned.enter_async_context(self._loaded_ranks(folder.path, served_name, board, tie)):
                log.info(
                    "follower_ready",
                    node_rank=self._group.rank,
                    nnodes=self._group.nodes,
                    metrics=metrics.url,
                    leader=self._group.tie_address,
                )
                await self._until_over(tie)
        log.info("worker_stopped")

    async def _joined(self, owned: AsyncExitStack, facts: dict[str, str]) -> Follower | None:
        """The tie to the leader; None when stopped before there was one."""
        limit_s = self._settings.worker.start_timeout_s
        joining = asyncio.ensure_future(owned.enter_async_context(joined(self._group, host_id.read(), facts, limit_s)))
        if await first_of(joining, self._stop):
            return joining.result()
        joining.cancel()
        with suppress(asyncio.CancelledError):
            await joining
        return None

    @asynccontextmanager
    async def _loaded_ranks(
        self, model_path: Path, served_name: str, board: Board, tie: Follower
    ) -> AsyncIterator[bool]:
        """This node's ranks, loaded in a thread, while the block runs; False when stopped meanwhile."""
        limit_s = self._settings.worker.start_timeout_s
        loading = in_daemon_thread(lambda: self._load_ranks(model_path, served_name, board, tie.shared.owner_key))
        if not await first_of(loading, self._stop, tie.lost, limit_s=limit_s):
            self.load_abandoned = True
            log.warning("load_abandoned", stopped=self._stop.is_set())
            if tie.lost.is_set() and not self._stop.is_set():
                raise EngineDeadError(self._leader_gone, code="node_lost")
            if not self._stop.is_set():
                raise StartupError(f"the engine did not load within {limit_s:g} s (worker.start_timeout_s)")
            yield False
            return
        self._ranks = ranks = loading.result()
        try:
            yield True
        finally:
            await asyncio.to_thread(ranks.shutdown)

    def _load_ranks(self, model_path: Path, served_name: str, board: Board, owner_key: bytes) -> VllmRanks:
        os.umask(0o077)  # as for an engine: the sockets by which its processes talk are temporary files
        from engine.vllm_ranks import VllmRanks  # late: it takes seconds, and needs the environment

        ranks = VllmRanks(
            self._settings, model_path=model_path, served_name=served_name, board=board, owner_key=owner_key
        )
        ranks.start()
        return ranks

    async def _until_over(self, tie: Follower) -> None:
        """Until the leader has ended because this node is to stop.

        Raises:
            EngineDeadError: the leader ended otherwise, or a rank did.
        """
        assert self._ranks is not None
        while not self._stop.is_set():
            if tie.lost.is_set():
                log.error("leader_lost", leader=self._group.tie_address)
                raise EngineDeadError(self._leader_gone, code="node_lost")
            if not self._ranks.alive:
                log.error("rank_died")
                raise EngineDeadError("a rank of this node has died")
            with suppress(TimeoutError):
                async with asyncio.timeout(_CHECK_S):
                    await self._stop.wait()
        tie.stop()
        limit_s = self._settings.worker.drain_timeout_s + _LEADER_END_S
        log.info("worker_draining", limit_s=limit_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await tie.lost.wait()

    @property
    def _leader_gone(self) -> str:
        return f"node 0 of this worker, at {self._group.tie_address}, is gone: its ranks here are of no use"
