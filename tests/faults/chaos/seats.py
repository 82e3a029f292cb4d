"""The processes of the cluster: each has a seat, and whoever ends is followed by a new one on the same ports."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc.aio
import psutil

from deploy.processes import Component, Process
from slipstream import config_file
from slipstream.free_ports import free_ports
from slipstream.settings import Settings
from slipstream.v1 import registry_pb2, registry_pb2_grpc, worker_pb2, worker_pb2_grpc
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState
from tests.faults.chaos import settings as chaos_settings
from tests.faults.chaos.plan import Group, Shape
from tests.support import fault_cluster, warm_processes
from tests.support.warm_processes import Forked

RESTART_S = 0.4
_THERE = (WorkerState.READY, WorkerState.FENCED)
_COMMANDS = {
    Group.PREFILL: ("prefill-worker",),
    Group.DECODE: ("decode-worker",),
    Group.FRONTEND: ("frontend",),
    Group.PLANE: ("planner", "serve"),
}


class Running(Protocol):
    """A process: one of `deploy.processes`, or a forked one."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int: ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class Seat:
    """One process' place.

    Attributes:
        starts: processes so far that sat here.
        ending: why the process that runs now will end, for as long as somebody has made it end.
        ends: of each that has ended: its number, and why.
    """

    name: str
    group: Group
    index: int
    settings: Settings
    log: Path
    launch: Callable[[Seat], Running]
    process: Running | None = None
    starts: int = 0
    ending: str = ""
    ends: dict[int, str] = field(default_factory=dict)
    record: WorkerRecord | None = None
    epochs: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings.worker.port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.frontend.http_port}"

    @property
    def grpc_target(self) -> str:
        return f"127.0.0.1:{self.settings.frontend.grpc_port}"

    def tree(self) -> list[int]:
        """The process and its descendants, those of its session too (an engine)."""
        if self.pid is None:
            return []
        found = [self.pid]
        with suppress(psutil.Error):
            found += [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        engine = self.engine_pid()
        return found + ([engine] if engine is not None and engine not in found else [])

    def engine_pid(self) -> int | None:
        """The process that listens where the transfer agent does, if it is another one than the service."""
        port = self.settings.transfer.port
        if self.group not in (Group.PREFILL, Group.DECODE):
            return None
        for connection in psutil.net_connections(kind="tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return connection.pid if connection.pid != self.pid else None
        return None

    def send(self, number: signal.Signals, *, why: str = "", engine: bool = True) -> None:
        """To the process and all it has started, or, without `engine`, to it alone."""
        if why:
            self.ending = why
        for pid in self.tree() if engine else [self.pid]:
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    async def status(self, timeout_s: float = 2.0) -> WorkerRecord | None:
        """A worker's own record now; None when it does not answer."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                record: WorkerRecord = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=timeout_s)
            except grpc.aio.AioRpcError:
                return None
        if record.HasField("transfer") and record.transfer.epoch not in self.epochs:
            self.epochs.append(record.transfer.epoch)
        self.record = record
        return record

    async def set_role(self, role: Role.ValueType) -> bool:
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                await stub.SetRole(worker_pb2.SetRoleRequest(role=role), timeout=5.0)
            except grpc.aio.AioRpcError:
                return False
        return True


class Cluster:
    """All seats. Made by `running`.

    Args:
        on_unasked_end: told of each process that ends although nobody made it.
    """

    def __init__(self, seats: list[Seat], base: Settings, on_unasked_end: Callable[[Seat, int], None]) -> None:
        self.seats = seats
        self.settings = base
        self._on_unasked_end = on_unasked_end
        self._stopping = False

    def of(self, *groups: Group) -> list[Seat]:
        return [seat for seat in self.seats if seat.group in groups]

    @property
    def workers(self) -> list[Seat]:
        return self.of(Group.PREFILL, Group.DECODE)

    @property
    def frontends(self) -> list[Seat]:
        return self.of(Group.FRONTEND)

    async def keep(self, seat: Seat) -> None:
        """Have somebody on this seat until the run stops."""
        while not self._stopping:
            seat.process = seat.launch(seat)
            seat.starts += 1
            code = await seat.process.wait()
            why, seat.ending = seat.ending, ""
            seat.process, seat.record = None, None
            seat.ends[seat.starts] = why or f"exit {code}"
            if not why:
                self._on_unasked_end(seat, code)
            await asyncio.sleep(RESTART_S)

    async def known(self) -> list[WorkerRecord]:
        """The registry's view; empty while the control plane is away."""
        async with grpc.aio.insecure_channel(self.settings.control_plane.address) as channel:
            call = registry_pb2_grpc.RegistryStub(channel).Watch(registry_pb2.WatchRequest(), timeout=3.0)
            try:
                view = await call.read()
            except grpc.aio.AioRpcError:
                return []
            finally:
                call.cancel()
        return list(view.workers) if isinstance(view, registry_pb2.WorkerSet) and view.settled else []

    async def ready(self, seats: list[Seat] | None = None) -> list[str]:
        """Which of these do not take requests as they should; none when all is well."""
        missing = []
        states = {one.worker_id: (one.state, one.role, one.epoch) for one in await self.known()}
        for seat in seats if seats is not None else self.seats:
            if seat.group is Group.FRONTEND:
                well = await _answers(seat.settings.frontend.http_port)
            elif seat.group is Group.PLANE:
                well = bool(states)
            else:
                record = await seat.status()
                role = Role.ROLE_PREFILL if seat.group is Group.PREFILL else Role.ROLE_DECODE
                # One that is fenced is there; that others go first is as it should be.
                wanted = [(state, role, record.epoch) for state in _THERE] if record is not None else []
                well = states.get(seat.name) in wanted
            if not well:
                missing.append(seat.name)
        return missing

    async def until_ready(self, seats: list[Seat] | None, timeout_s: float) -> list[str]:
        """Wait for it; returns who is not in time."""
        end_s = time.monotonic() + timeout_s
        while missing := await self.ready(seats):
            if time.monotonic() > end_s:
                return missing
            await asyncio.sleep(0.2)
        return []

    async def stop(self, timeout_s: float) -> list[str]:
        """SIGTERM to all, frontends first; returns who had to be killed."""
        self._stopping = True
        late = []
        for groups in ((Group.FRONTEND,), (Group.PREFILL, Group.DECODE), (Group.PLANE,)):
            waits = {}
            for seat in self.of(*groups):
                if seat.process is not None:
                    waits[seat.name] = (seat, asyncio.create_task(seat.process.wait()))
                    seat.send(signal.SIGTERM, why="stop", engine=False)
            end_s = time.monotonic() + timeout_s
            for name, (seat, task) in waits.items():
                await asyncio.wait({task}, timeout=max(0.1, end_s - time.monotonic()))
                if not task.done():
                    late.append(name)
                    seat.send(signal.SIGUSR1)
                    await asyncio.sleep(0.5)
                    if seat.process is not None:
                        seat.process.kill()
                    seat.send(signal.SIGKILL)
                    await asyncio.wait({task}, timeout=10.0)
        return late


async def _answers(http_port: int) -> bool:
    """Whether a frontend says that it is ready."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", http_port)
            try:
                writer.write(b"GET /health/ready HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n\r\n")
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


@asynccontextmanager
async def running(
    model: Path, folder: Path, shape: Shape, on_unasked_end: Callable[[Seat, int], None]
) -> AsyncIterator[Cluster]:
    """A cluster while the block runs; it is not ready yet when the block begins."""
    seats = _seats(model, folder, shape)
    plane = next(seat for seat in seats if seat.group is Group.PLANE)
    cluster = Cluster(seats, plane.settings, on_unasked_end)
    keepers = [asyncio.create_task(cluster.keep(seat), name=f"keep {seat.name}") for seat in seats]
    try:
        yield cluster
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for seat in seats:
            if seat.process is not None:
                seat.send(signal.SIGKILL)
                seat.process.kill()


def _seats(model: Path, folder: Path, shape: Shape) -> list[Seat]:
    names = [(Group.PLANE, 0)] + [
        (group, index)
        for group in (Group.PREFILL, Group.DECODE, Group.FRONTEND)
        for index in range(shape.members(group))
    ]
    ports = iter(free_ports(1 + 3 * len(names)))
    base = chaos_settings.base(model, shape, next(ports))
    environ = _environ(folder)
    seats = []
    for group, index in names:
        name = f"{group}-{index}" if group is not Group.PLANE else str(group)
        three = (next(ports), next(ports), next(ports))
        own = _own(base, shape, group, index, name, three, folder)
        file = folder / f"{name}.yaml"
        config_file.write(own, file)
        argv = (sys.executable, "-P", "-m", "slipstream", *_COMMANDS[group], "--config", str(file))
        log = folder / f"{name}.log"
        component = Component(name, argv, environ, log)
        launch = _spawning(component)
        if shape.engine == "vllm" and group in (Group.PREFILL, Group.DECODE):
            launch = _fork
        seats.append(Seat(name, group, index, own, log, launch))
    return seats


def _own(
    base: Settings, shape: Shape, group: Group, index: int, name: str, ports: tuple[int, int, int], folder: Path
) -> Settings:
    if group is Group.PLANE:
        plane = base.control_plane.model_copy(update={"metrics_port": ports[0]})
        return base.model_copy(update={"control_plane": plane})
    if group is Group.FRONTEND:
        # Every second one is a pool of two processes.
        faces = base.frontend.model_copy(
            update={"http_port": ports[0], "grpc_port": ports[1], "workers": 1 + index % 2}
        )
        log = base.log.model_copy(update={"access_log": folder / f"{name}.access.jsonl"})
        return base.model_copy(update={"frontend": faces, "log": log})
    worker, transfer = chaos_settings.worker(shape, name, ports)
    return base.model_copy(update={"worker": worker, "transfer": transfer})


def _environ(folder: Path) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    root = str(Path(__file__).parents[3])
    return environ | {"PYTHONPATH": root, "TMPDIR": str(temporary)}


def _spawning(component: Component) -> Callable[[Seat], Running]:
    return lambda _: Process.spawn(component)


def _fork(seat: Seat) -> Running:
    target = fault_cluster.run_prefill if seat.group is Group.PREFILL else fault_cluster.run_decode
    return Forked(warm_processes.start(target, seat.settings, log=seat.log), seat.log)
