"""What a cluster's processes have: memory, files, sockets, threads; and what its workers and its frontend hold."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import Server
from slipstream.v1 import registry_pb2
from slipstream.v1.registry_pb2_grpc import RegistryStub

_TIMEOUT_S = 10.0
_POLL_S = 0.5
_PACKAGE = "slipstream"

FRONTEND_HELD = (
    "slipstream_frontend_requests_in_flight",
    "slipstream_frontend_dispatched_requests",
    "slipstream_frontend_queue_requests",
)
WORKER_HELD = (
    "slipstream_kv_handoffs_held",
    "slipstream_worker_kv_blocks_used",
    "slipstream_worker_requests_open",
    "slipstream_worker_requests_running",
    "slipstream_worker_requests_waiting",
)
_TOLD = (*FRONTEND_HELD, *WORKER_HELD, "slipstream_frontend_tasks", "slipstream_frontend_index_blocks")


@dataclass(frozen=True, slots=True)
class Has:
    """One process, now."""

    memory_mib: float
    fds: int
    sockets: int
    threads: int


@dataclass(slots=True)
class Samples:
    """One process over time."""

    times_s: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)


def processes(server: Server) -> dict[str, Has]:
    """By name. One that ends meanwhile is left out."""
    found: dict[str, Has] = {}
    for one in _family(server.pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            name = _name(one)
            name = name if name not in found else f"{name}/{one.pid}"
            found[name] = Has(
                round(one.memory_info().rss / 2**20, 3), one.num_fds(), _sockets(one.pid), one.num_threads()
            )
    return found


class Watch:
    """Samples all processes while the block runs."""

    def __init__(self, server: Server, every_s: float) -> None:
        self._server, self._every_s = server, every_s
        self.began_s = time.monotonic()
        self.by_process: dict[str, Samples] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Watch:
        self.began_s = time.monotonic()
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            now_s = time.monotonic() - self.began_s
            for name, has in (await asyncio.to_thread(processes, self._server)).items():
                one = self.by_process.setdefault(name, Samples())
                one.times_s.append(now_s)
                one.memory_mib.append(has.memory_mib)
                one.fds.append(has.fds)


async def held(server: Server, folder: Path) -> dict[str, float]:
    """What frontend and workers say that they hold, by process and figure."""
    pages = {"frontend": f"{server.url}/metrics"} | await _worker_pages(folder)
    found: dict[str, float] = {}
    for name, url in pages.items():
        for figure, value in (await asyncio.to_thread(_figures, url)).items():
            found[f"{name} {figure}"] = value
    return found


async def until_nothing_is_held(server: Server, folder: Path, timeout_s: float) -> dict[str, float]:
    """The figures once no request, block or lease is held, or those of the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        now = await held(server, folder)
        if not still_held(now) or time.monotonic() > deadline_s:
            return now
        await asyncio.sleep(_POLL_S)


def still_held(figures: dict[str, float]) -> dict[str, float]:
    """Of these, what must be 0 when nobody asks for anything, and is not."""
    wanted = (*FRONTEND_HELD, *WORKER_HELD)
    return {name: value for name, value in figures.items() if name.endswith(wanted) and value}


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    return []


def _name(process: psutil.Process) -> str:
    """What it is, by its command line: `prefill-0`, `frontend`; its children by their parent's name and their own."""
    argv = process.cmdline()
    if "--worker-id" in argv[:-1]:
        return argv[argv.index("--worker-id") + 1]
    if _PACKAGE in argv[:-1]:
        return argv[argv.index(_PACKAGE) + 1]
    parent = process.parent()
    return f"{_name(parent)}'s {process.name()}" if parent is not None else process.name()


def _sockets(pid: int) -> int:
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(link.readlink()).startswith("socket:")
    return count


async def _worker_pages(folder: Path) -> dict[str, str]:
    settings = yaml.safe_load(await asyncio.to_thread((folder / "cluster" / "slipstream.yaml").read_text))
    async with grpc.aio.insecure_channel(settings["control_plane"]["address"]) as channel:
        watch = RegistryStub(channel).Watch(registry_pb2.WatchRequest(), timeout=_TIMEOUT_S)
        async for workers in watch:
            watch.cancel()
            return {one.worker_id: one.metrics_url for one in workers.workers}
    return {}


def _figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _TOLD and sample.labels.get("endpoint") != "metrics":
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
