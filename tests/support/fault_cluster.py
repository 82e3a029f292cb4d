"""A cluster whose workers can be killed hundreds of times: real services, engines and control plane, forked on demand.

Each member keeps its ports, so that a new incarnation has the address of the one before it. The KV caches are small, so
that decode workers preempt and wait for room; steps and spans are small, so that even short prompts travel in many
pieces.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import grpc.aio
import psutil

import decode_worker.process
import planner.server
import prefill_worker.process
from kv_transfer import agent_start, exchange, outbound
from kv_transfer.board import PREFIX, SEGMENT_SUFFIX, SUFFIX, Board
from slipstream.errors import TransferError
from slipstream.free_ports import free_ports
from slipstream.settings import ControlPlaneSettings, FrontendSettings, LogSettings, Settings
from slipstream.v1 import worker_pb2, worker_pb2_grpc
from slipstream.v1.registry_pb2 import WorkerRecord
from slipstream.worker_settings import TransferSettings, WorkerSettings
from tests.support import warm_processes

Kind = Literal["prefill", "decode"]

LEASE_S = 1.0
SILENCE_S = 0.6
_SHM = Path("/dev/shm")
_BLOCK_TOKENS = 32
_SPAN_BYTES = 32 << 10
_LARGE = agent_start._SPAN_BYTES, outbound._READ_SPAN_BYTES, exchange._SMALL_BYTES


def run_prefill(settings: Settings) -> None:
    """What a prefill worker's process runs."""
    prefill_worker.process.run(settings)


def run_decode(settings: Settings) -> None:
    """What a decode worker's process runs."""
    decode_worker.process.run(settings)


def run_control_plane(settings: Settings) -> None:
    """What the control plane's process runs."""
    asyncio.run(planner.server.serve(settings))


def cut_small() -> None:
    """In an engine: the tiny model's handoffs shall have many spans, and use the copy threads as a large model's do."""
    agent_start._SPAN_BYTES = _SPAN_BYTES
    outbound._READ_SPAN_BYTES = _SPAN_BYTES
    exchange._SMALL_BYTES = _SPAN_BYTES // 2


def leave_large() -> None:
    """After all: an engine as it is."""
    agent_start._SPAN_BYTES, outbound._READ_SPAN_BYTES, exchange._SMALL_BYTES = _LARGE


@dataclass(slots=True)
class Member:
    """One worker's place in the cluster, and the process that fills it now.

    Attributes:
        starts: incarnations so far.
        boards: names of the lease boards of its incarnations.
    """

    name: str
    kind: Kind
    settings: Settings
    log: Path
    process: BaseProcess | None = None
    starts: int = 0
    boards: list[str] = field(default_factory=list)
    record: WorkerRecord | None = None

    def start(self) -> None:
        """Fork a new incarnation."""
        target = run_prefill if self.kind == "prefill" else run_decode
        self.process = warm_processes.start(target, self.settings, log=self.log)
        self.starts += 1
        self.record = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings.worker.port}"

    @property
    def service_pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    def engine_pid(self) -> int | None:
        """The process that listens where the transfer agent does; None while there is none."""
        port = self.settings.transfer.port
        for connection in psutil.net_connections(kind="tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return connection.pid
        return None

    def board(self) -> Board | None:
        """The lease board of this incarnation, mapped; close it."""
        if self.record is None:
            return None
        with suppress(TransferError):
            return Board.open(_SHM / board_name(self.record))
        return None

    def signal(self, number: signal.Signals, *, service: bool = True, engine: bool = True) -> bool:
        """To the processes of this worker that are there; False when none is."""
        pids = [self.service_pid] if service and self.alive else []
        engine_pid = self.engine_pid() if engine else None
        for pid in [*pids, *([engine_pid] if engine_pid is not None else [])]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(pids) or engine_pid is not None

    async def status(self, timeout_s: float = 2.0) -> WorkerRecord | None:
        """Its own record now; None when it does not answer."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                record: WorkerRecord = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=timeout_s)
            except grpc.aio.AioRpcError:
                return None
        if record.HasField("transfer"):
            name = board_name(record)
            if name not in self.boards:
                self.boards.append(name)
            self.record = record
        return record


def board_name(record: WorkerRecord) -> str:
    return f"{PREFIX}{record.transfer.epoch:016x}{SUFFIX}"


def leftovers(member: Member) -> list[str]:
    """Files in shared memory of a member's earlier incarnations."""
    stems = [name.removesuffix(SUFFIX) for name in member.boards[:-1]]
    return [path.name for stem in stems for path in (*_SHM.glob(f"{stem}{SUFFIX}"), *_SHM.glob(f"{stem}-*"))]


async def kept_by(members: Iterable[Member]) -> list[str]:
    """What members hold that nobody asks for any more; nothing when all is well."""
    kept = []
    for member in members:
        record = await member.status()
        load = record.load if record is not None else None
        if load is None:
            kept.append(f"{member.name} does not answer")
        elif load.blocks_used or load.handoffs_held or load.running or load.waiting:
            kept.append(
                f"{member.name} keeps {load.blocks_used} blocks, {load.handoffs_held} handoffs, "
                f"{load.running} running, {load.waiting} waiting"
            )
        kept += [f"left in shared memory: {name}" for name in leftovers(member)]
    return kept


def landing_area(record: WorkerRecord) -> Path | None:
    """The file in which spans land at this worker; None when there is none."""
    stem = board_name(record).removesuffix(SUFFIX)
    return next(iter(_SHM.glob(f"{stem}-*{SEGMENT_SUFFIX}")), None)


@dataclass(slots=True)
class FaultCluster:
    """See the module's docstring; made by `running`."""

    settings: Settings
    members: list[Member]
    plane_log: Path
    plane: BaseProcess | None = None

    def start_plane(self) -> None:
        self.plane = warm_processes.start(run_control_plane, self.settings, log=self.plane_log)

    def of(self, kind: Kind) -> list[Member]:
        return [member for member in self.members if member.kind == kind]

    def revive(self) -> None:
        """Start again what has ended."""
        for member in self.members:
            if not member.alive:
                member.start()
        if self.plane is None or not self.plane.is_alive():
            self.start_plane()

    def kill(self) -> None:
        """End everything at once; the engines follow their services."""
        for member in self.members:
            member.signal(signal.SIGKILL)
        for process in (*(member.process for member in self.members), self.plane):
            if process is not None:
                process.kill()
                process.join(10)
        for member in self.members:
            for name in member.boards:
                for path in _SHM.glob(f"{name.removesuffix(SUFFIX)}*"):
                    path.unlink(missing_ok=True)


@contextmanager
def running(
    model: Path, folder: Path, *, prefill: int, decode: int, mode: Literal["direct", "staged"]
) -> Iterator[FaultCluster]:
    """A cluster while the block runs. It is not ready yet when the block begins."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"prefill-{number}" for number in range(prefill)] + [f"decode-{number}" for number in range(decode)]
    ports = iter(free_ports(3 * len(names) + 1))
    base = _settings(model, next(ports))
    members = []
    for name in names:
        kind: Kind = "prefill" if name.startswith("prefill") else "decode"
        worker = WorkerSettings(
            worker_id=name,
            port=next(ports),
            metrics_port=next(ports),
            max_model_len=1024,
            # Two full contexts: more requests than that have to take turns.
            kv_cache_bytes=1 << 20,
            block_tokens=_BLOCK_TOKENS,
            max_batched_tokens=64,
            max_running=16,
            threads=1,
            drain_timeout_s=3.0,
            engine_silence_s=8.0,
            engine_hang_s=16.0,
        )
        transfer = TransferSettings(
            transport="shm",
            mode=mode,
            port=next(ports),
            lease_s=LEASE_S,
            timeout_s=1.5,
            silence_s=SILENCE_S,
            landing_bytes=1 << 20,
            board_slots=64,
        )
        settings = base.model_copy(update={"worker": worker, "transfer": transfer})
        members.append(Member(name, kind, settings, folder / f"{name}.log"))
    cluster = FaultCluster(base, members, folder / "control-plane.log")
    with ExitStack() as stack:
        stack.callback(cluster.kill)
        cluster.revive()
        yield cluster


def _settings(model: Path, control_plane_port: int) -> Settings:
    return Settings(
        model=str(model),
        served_model_name="tiny",
        device="cpu",
        dtype="float32",
        control_plane=ControlPlaneSettings(
            port=control_plane_port, address=f"127.0.0.1:{control_plane_port}", lease_s=3.0
        ),
        frontend=FrontendSettings(
            handoff="always",
            request_timeout_s=60.0,
            prefill_timeout_s=5.0,
            first_token_timeout_s=8.0,
            token_timeout_s=6.0,
        ),
        log=LogSettings(level="info"),
    )
