"""The cluster that the cases of the fault table break: workers, control plane and a frontend of two processes, all of
them real, with the tiny model. The suite itself plays the supervisor: what has ended is started again by `whole`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import uvloop

import frontend.pool
import frontend.process
from slipstream import telemetry
from slipstream.errors import SlipstreamError
from slipstream.free_ports import free_ports
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import WorkerState
from tests.faults.load import HANG_S, OwnConnection, Pair
from tests.support import fault_cluster, warm_processes
from tests.support.clear_answers import clear_answers
from tests.support.fault_cluster import FaultCluster, kept_by
from tests.support.tiny_model import VOCAB_SIZE, make_tiny_model

READY_S = 180.0
QUIET_S = 30.0
ANSWER_TOKENS = 160
FRONTEND_PROCESSES = 2
_PROMPTS = 24
_POLL_S = 0.1
_ASK_S = 5.0


def run_frontend(settings: Settings) -> None:
    """What a frontend's process runs."""
    telemetry.configure(settings.log, component="frontend")
    serve = frontend.pool.supervise if settings.frontend.workers > 1 else frontend.process.serve
    uvloop.run(serve(settings))


@dataclass(slots=True)
class Arena:
    """See the module's docstring; made by `opened`."""

    cluster: FaultCluster
    pool: list[Pair]
    model: Path
    folder: Path
    frontend_settings: Settings
    frontend_log: Path
    frontend: BaseProcess | None = None
    lasting: ExitStack = field(default_factory=ExitStack)
    """What several cases share is entered here, and left with the cluster."""
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The gRPC face."""
        return f"127.0.0.1:{self.frontend_settings.frontend.grpc_port}"

    def start_frontend(self) -> None:
        self.frontend = warm_processes.start(run_frontend, self.frontend_settings, log=self.frontend_log)

    def frontend_processes(self) -> list[psutil.Process]:
        """Those that serve; their parent is not among them."""
        if self.frontend is None or self.frontend.pid is None:
            return []
        return psutil.Process(self.frontend.pid).children()

    async def whole(self, timeout_s: float = READY_S) -> float:
        """Start again what has ended, until every frontend process knows every worker; how long that took."""
        began_s = time.monotonic()
        while True:
            self.cluster.revive()
            if self.frontend is None or not self.frontend.is_alive():
                self.start_frontend()
            missing = await self._missing()
            took_s = time.monotonic() - began_s
            if not missing:
                return took_s
            if took_s > timeout_s:
                raise AssertionError(f"not whole again within {timeout_s:g} s: {', '.join(missing)}")
            await asyncio.sleep(_POLL_S)

    async def _missing(self) -> list[str]:
        records = await asyncio.gather(*(member.status() for member in self.cluster.members))
        missing = [
            member.name
            for member, record in zip(self.cluster.members, records, strict=True)
            if record is None or record.state != WorkerState.READY
        ]
        if not missing and not await self.all_known():
            missing.append("a worker, to a frontend")
        return missing

    async def all_known(self) -> bool:
        """Whether frontends know every worker; as each connection meets one process, several are made."""
        return all(await asyncio.gather(*(self._knows_all() for _ in range(2 * FRONTEND_PROCESSES))))

    async def _knows_all(self) -> bool:
        async with OwnConnection(self.target, timeout_s=_ASK_S) as client:
            try:
                models = await client.models()
            except SlipstreamError:
                return False
        return sum(one.prefill_workers + one.decode_workers for one in models) == len(self.cluster.members)

    async def quiet(self, timeout_s: float = QUIET_S) -> tuple[float, list[str]]:
        """After the last request has ended: how long until nothing is held, and what still is after that time."""
        began_s = time.monotonic()
        while True:
            kept = await kept_by(self.cluster.members)
            took_s = time.monotonic() - began_s
            if not kept or took_s > timeout_s:
                return took_s, kept
            await asyncio.sleep(_POLL_S)

    def close(self) -> None:
        """End the frontend; the cluster ends itself."""
        if self.frontend is not None:
            for process in self.frontend_processes():
                process.kill()
            self.frontend.kill()
            self.frontend.join(10)


def make_pool(model: Path, folder: Path, *, seed: int) -> list[Pair]:
    """Prompts from shorter than a block to half of a context, and what a plain engine answers to them."""
    rng = random.Random(f"{seed}:faults")
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((40, 64, 200, 400)))] for _ in range(4)]
    prompts = [
        rng.choice(stems) + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 300))]
        for _ in range(_PROMPTS)
    ]
    pairs = clear_answers(model, prompts, ANSWER_TOKENS, folder)
    return [(prompt, answer) for prompt, answer in pairs if len(prompt) + len(answer) < 1000]


@asynccontextmanager
async def opened(folder: Path, *, seed: int, prefill: int = 2, decode: int = 2) -> AsyncIterator[Arena]:
    """A whole cluster while the block runs."""
    warm_processes.start_fork_server()
    model = await asyncio.to_thread(make_tiny_model, folder / "tiny")
    pool = await asyncio.to_thread(make_pool, model, folder, seed=seed)
    with fault_cluster.running(model, folder, prefill=prefill, decode=decode, mode="direct") as cluster:
        arena = Arena(cluster, pool, model, folder, _frontend_settings(cluster), folder / "frontend.log")
        try:
            await arena.whole()
            yield arena
        finally:
            arena.close()
            await asyncio.to_thread(arena.lasting.close)


def _frontend_settings(cluster: FaultCluster) -> Settings:
    settings = cluster.settings
    taken = [member.settings.transfer.port for member in cluster.members]
    http_port, grpc_port = free_ports(2, chosen=taken)
    chosen = settings.frontend.model_copy(
        update={
            "http_port": http_port,
            "grpc_port": grpc_port,
            "workers": FRONTEND_PROCESSES,
            "request_timeout_s": HANG_S,
        }
    )
    # More may be asked at once than is soon answered: what is refused for that would show nothing.
    patient = settings.admission.model_copy(update={"realtime_wait_s": HANG_S})
    return settings.model_copy(update={"frontend": chosen, "admission": patient})
