"""A server that is measured: started, waited for, its CPU time read, stopped whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from deploy.processes import Component, Process, describe_exit, log_tail
from slipstream.child_python import module_path
from slipstream.config_layer import ENV_PREFIX
from slipstream.errors import StartupError

_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        url: of its HTTP face, without `/v1`.
        has_account: whether it tells what a request cost when asked (`Question.with_account`).
        start_s: from its start until it was ready.
        more_pids: of processes that belong to it and were not started by `pid`.
    """

    name: str
    url: str
    model: str
    pid: int
    has_account: bool
    start_s: float
    more_pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds in a span of time: of the server, of this client, and of everything else on the machine."""

    wall_s: float
    server_s: float
    client_s: float
    others_s: float


class CpuMeter:
    """Measures from when it is made."""

    def __init__(self, server: Server) -> None:
        self._pids = (server.pid, *server.more_pids)
        self._start_s = self._clocks()

    def read(self) -> CpuUse:
        wall_s, server_s, client_s, machine_s = (
            now_s - start_s for now_s, start_s in zip(self._clocks(), self._start_s, strict=True)
        )
        return CpuUse(wall_s, server_s, client_s, max(0.0, machine_s - server_s - client_s))

    def _clocks(self) -> tuple[float, float, float, float]:
        return time.monotonic(), sum(map(tree_cpu_s, self._pids)), time.process_time(), _machine_cpu_s()


def _machine_cpu_s() -> float:
    """CPU seconds of all processes since boot; `steal` is what the host gave to other guests."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all that it has started and that still run."""
    total_s = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total_s += times.user + times.system
    return total_s


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What a measured server gets: this very code on its path, and no setting of Slipstream's."""
    child = {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}
    child["PYTHONPATH"] = module_path(environ)
    child["PYTHONUNBUFFERED"] = "1"
    return child


@asynccontextmanager
async def running(
    component: Component,
    until_ready: Callable[[], Awaitable[None]],
    *,
    start_timeout_s: float,
    stop_timeout_s: float,
) -> AsyncIterator[Process]:
    """The process, ready, while the block runs.

    Raises:
        StartupError: it ended, or was not ready in time; with the end of its log.
    """
    process = Process.spawn(component)
    try:
        await _ready(process, component, until_ready, start_timeout_s)
        yield process
    finally:
        await _stop(process, stop_timeout_s)


async def _ready(
    process: Process, component: Component, until_ready: Callable[[], Awaitable[None]], timeout_s: float
) -> None:
    ready, ended = asyncio.ensure_future(until_ready()), asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait({ready, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            tail = log_tail(component.log_path)
            raise StartupError(f"{component.name} {describe_exit(ended.result())}; its log ends:\n{tail}")
        if not ready.done():
            raise StartupError(f"{component.name} was not ready within {timeout_s:g} s; see {component.log_path}")
        await ready
    finally:
        for task in (ready, ended):
            task.cancel()
        await asyncio.wait({ready, ended})


async def _stop(process: Process, timeout_s: float) -> None:
    try:
        process.ask_to_end()
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        # Also when the wait itself was interrupted; nothing happens to what has already ended.
        process.kill()
    async with asyncio.timeout(_KILL_TIMEOUT_S):
        await process.wait()
