"""Quiet points: no load, no fault. What is still held, left over, or more than it was, is a leak."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kv_transfer.board import PREFIX, SUFFIX
from tests.faults.chaos import isolation
from tests.faults.chaos.checker import Checker
from tests.faults.chaos.plan import Group
from tests.faults.chaos.saboteur import READY_S
from tests.faults.chaos.scraping import page
from tests.faults.chaos.seats import Cluster, Seat

QUIET_S = 40.0
"""Longest until nothing is held any more: leases, silences and keep-alives run out sooner."""
ENDPOINTS = ("completions", "chat", "generate")
_SHM = Path("/dev/shm")
# What a process may have more than at its first quiet point: pools of threads and connections fill with use.
_MORE = {"fds": 16, "threads": 8, "tasks": 40}
_YOUNG_S = 60.0
_SLOPE_POINTS = 5
_SLOPE_SKIPPED = 3
_MIB = 1 << 20
_SLOPE_MIB = 24.0
_SLOPE_MIB_PER_MINUTE = 0.5


@dataclass(slots=True)
class Life:
    """One process at the quiet points of its life."""

    name: str
    pid: int
    at_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    first: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)


class QuietPoints:
    """Looks at a whole cluster; keeps what each process had, for the next time."""

    def __init__(self, cluster: Cluster, checker: Checker, folder: Path) -> None:
        self._cluster = cluster
        self._checker = checker
        self._folder = folder
        self._lives: dict[tuple[str, int], Life] = {}
        self.slowest_s = 0.0
        self.points = 0

    async def look(self) -> bool:
        """One quiet point; False when the cluster is not whole."""
        engine = self._cluster.seats[-1].settings.worker.engine
        limit_s = READY_S[engine]
        missing = await self._cluster.until_ready(None, limit_s)
        if not self._checker.check("all are ready again", not missing, f"{missing} not within {limit_s:g} s"):
            await dump_stacks(self._cluster, missing)
            return False
        await self._nothing_held()
        await self._nothing_left()
        await self._nothing_grown()
        self.points += 1
        return True

    # -- held ---------------------------------------------------------------------------------------------

    async def _nothing_held(self) -> None:
        began_s = time.monotonic()
        while True:
            held = await self._held()
            took_s = time.monotonic() - began_s
            if not held or took_s > QUIET_S:
                break
            await asyncio.sleep(0.2)
        self.slowest_s = max(self.slowest_s, took_s)
        self._checker.check("no block, lease or request is held", not held, f"after {took_s:.0f} s: {'; '.join(held)}")
        if held:
            await dump_stacks(self._cluster, [line.split(" ")[0] for line in held])

    async def _held(self) -> list[str]:
        held = []
        for seat in self._cluster.workers:
            record = await seat.status()
            if record is None:
                held.append(f"{seat.name} does not answer")
                continue
            load = record.load
            if load.blocks_used or load.handoffs_held or load.running or load.waiting:
                held.append(
                    f"{seat.name} has {load.blocks_used} blocks, {load.handoffs_held} leases, {load.running} running, "
                    f"{load.waiting} waiting"
                )
            figures = await asyncio.to_thread(page, record.metrics_url)
            if figures is not None and figures.total("slipstream_worker_requests_open"):
                held.append(f"{seat.name} has {figures.total('slipstream_worker_requests_open'):g} open calls")
        for seat in self._cluster.frontends:
            figures = await asyncio.to_thread(page, f"{seat.http_url}/metrics")
            if figures is None:
                held.append(f"{seat.name} does not tell its metrics")
                continue
            open_now = {
                f"{endpoint} {name}": figures.total(f"slipstream_frontend_{name}", endpoint=endpoint)
                for endpoint in ENDPOINTS
                for name in ("requests_in_flight", "requests_awaiting_first_token")
            } | {
                name: figures.total(f"slipstream_frontend_{name}") for name in ("queue_requests", "dispatched_requests")
            }
            held += [f"{seat.name} has {count:g} {name}" for name, count in open_now.items() if count]
        return held

    # -- left ---------------------------------------------------------------------------------------------

    async def _nothing_left(self) -> None:
        await self._soon("no file is left in shared memory", self._segments)
        await self._soon("no process is left", self._orphans)
        await self._soon("no temporary file is left", self._temporary)

    def _segments(self) -> list[str]:
        """Files of workers that are no more; in a /dev/shm of our own all that no worker of now has."""
        living = {f"{seat.epochs[-1]:016x}" for seat in self._cluster.workers if seat.epochs}
        dead = {f"{epoch:016x}" for seat in self._cluster.workers for epoch in seat.epochs} - living
        names = [path.name for path in _SHM.glob(f"{PREFIX}*")]
        stems = {name: name.removeprefix(PREFIX).removesuffix(SUFFIX)[:16] for name in names}
        if isolation.inside():
            return [name for name, stem in stems.items() if stem not in living]
        return [name for name, stem in stems.items() if stem in dead]

    def _orphans(self) -> list[str]:
        """Our children that sit nowhere: their parents have ended, and left them."""
        known = {seat.pid for seat in self._cluster.seats}
        found = []
        for child in psutil.Process().children():
            with suppress(psutil.Error, ChildProcessError):
                if child.pid in known:
                    continue
                if child.status() == psutil.STATUS_ZOMBIE:
                    if os.getpgid(child.pid) not in known and not _owned(child.pid):
                        os.waitpid(child.pid, os.WNOHANG)
                elif "multiprocessing" not in (line := " ".join(child.cmdline())):
                    found.append(f"{child.pid} {line[:200]}")
        return found

    def _temporary(self) -> list[str]:
        """In the processes' folder for such files: a pool of frontends keeps its own there while it runs."""
        kept = [path for path in (self._folder / "tmp").iterdir() if not path.name.startswith("slipstream-frontend-")]
        pools = sum(seat.settings.frontend.workers > 1 for seat in self._cluster.frontends)
        folders = list((self._folder / "tmp").glob("slipstream-frontend-*"))
        # A killed pool cannot take its folder with it.
        killed = sum(why == "kill" for seat in self._cluster.frontends for why in seat.ends.values())
        return [path.name for path in kept] + [path.name for path in folders[pools + killed :]]

    async def _soon(self, invariant: str, look: Callable[[], list[str]]) -> None:
        end_s = time.monotonic() + 10.0
        while (found := look()) and time.monotonic() < end_s:  # noqa: ASYNC110 - other processes: no event
            await asyncio.sleep(0.2)
        self._checker.check(invariant, not found, "; ".join(found))

    # -- grown --------------------------------------------------------------------------------------------

    async def _nothing_grown(self) -> None:
        end_s = time.monotonic() + 12.0
        while (grown := await self._grown()) and time.monotonic() < end_s:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.5)
        self._checker.check("no sockets, files, threads or tasks pile up", not grown, "; ".join(grown))
        for seat, pid in self._processes():
            with suppress(psutil.Error):
                life = self._life(seat, pid)
                life.at_s.append(time.monotonic())
                life.rss_mib.append(psutil.Process(pid).memory_info().rss / _MIB)

    async def _grown(self) -> list[str]:
        grown = []
        for seat, pid in self._processes():
            with suppress(psutil.Error):
                size = await self._size(seat, pid)
                life = self._life(seat, pid)
                first = life.first = self._first(life, size)
                life.last = size
                grown += [
                    f"{life.name} (pid {pid}) has {size[what]} {what}, {first[what]} at first"
                    for what, more in _MORE.items()
                    if what in size and what in first and size[what] > first[what] + more
                ]
                if half := size["half_closed"]:
                    grown.append(f"{life.name} (pid {pid}) has {half} connections that their peers have closed")
        return grown

    def _first(self, life: Life, size: dict[str, int]) -> dict[str, int]:
        """What it had at first: a process that is still starting has not opened all that it works with."""
        if life.first and time.time() - psutil.Process(life.pid).create_time() > _YOUNG_S:
            return life.first
        return {what: max(count, life.first.get(what, 0)) for what, count in size.items()}

    async def _size(self, seat: Seat | None, pid: int) -> dict[str, int]:
        process = psutil.Process(pid)
        states = [one.status for one in process.net_connections(kind="tcp")]
        size = {
            "fds": process.num_fds(),
            "threads": process.num_threads(),
            "half_closed": states.count(psutil.CONN_CLOSE_WAIT),
        }
        url = metrics_url(seat) if seat is not None and pid == seat.pid else ""
        figures = await asyncio.to_thread(page, url) if url else None
        if figures is not None and figures.has("slipstream_event_loop_tasks"):
            size["tasks"] = int(figures.total("slipstream_event_loop_tasks"))
        return size

    def _life(self, seat: Seat | None, pid: int) -> Life:
        name = seat.name if seat is not None else "the clients"
        if seat is not None and pid != seat.pid:
            name += "'s engine" if seat.group in (Group.PREFILL, Group.DECODE) else "'s member"
        return self._lives.setdefault((name, pid), Life(name, pid))

    def _processes(self) -> list[tuple[Seat | None, int]]:
        return [(None, os.getpid())] + [(seat, pid) for seat in self._cluster.seats for pid in seat.tree()]

    # -- over the whole run -------------------------------------------------------------------------------

    def slopes(self) -> list[dict[str, float | str | int]]:
        """How the memory of each process that lived long enough went: the median of all slopes between its points.

        Of the second half of them: an engine has touched all of its KV cache, and all of its allocators' pools, only
        after a thousand requests or two; what leaks goes on.
        """
        found: list[dict[str, float | str | int]] = []
        for life in self._lives.values():
            skipped = max(_SLOPE_SKIPPED, len(life.at_s) // 2)
            at_s, rss = life.at_s[skipped:], life.rss_mib[skipped:]
            if len(at_s) < _SLOPE_POINTS:
                continue
            minutes = (at_s[-1] - at_s[0]) / 60.0
            slope = theil_sen([one / 60.0 for one in at_s], rss)
            sizes = (("first", life.first), ("last", life.last))
            found.append(
                {
                    "process": life.name,
                    "pid": life.pid,
                    "points": len(at_s),
                    "minutes": round(minutes, 1),
                    "first_mib": round(rss[0], 1),
                    "last_mib": round(rss[-1], 1),
                    "mib_per_minute": round(slope, 3),
                    **{f"{when}_{what}": size[what] for when, size in sizes for what in _MORE if what in size},
                }
            )
        return found

    def check_slopes(self) -> None:
        """At the end of a run."""
        for one in self.slopes():
            slope, minutes = float(one["mib_per_minute"]), float(one["minutes"])
            flat = slope <= _SLOPE_MIB_PER_MINUTE or slope * minutes <= _SLOPE_MIB
            self._checker.check("memory stays", flat, f"{one['process']} grows by {slope:.2f} MiB a minute: {one}")


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median slope between any two points: what a few outliers do not change."""
    slopes = [(y[b] - y[a]) / (x[b] - x[a]) for a in range(len(x)) for b in range(a + 1, len(x)) if x[b] > x[a]]
    return statistics.median(slopes) if slopes else 0.0


def metrics_url(seat: Seat) -> str:
    """Where a process tells its figures."""
    if seat.group is Group.FRONTEND:
        return f"{seat.http_url}/metrics"
    if seat.group is Group.PLANE:
        return f"http://127.0.0.1:{seat.settings.control_plane.metrics_port}/metrics"
    return f"http://127.0.0.1:{seat.settings.worker.metrics_port}/metrics"


async def dump_stacks(cluster: Cluster, names: Sequence[str]) -> None:
    """Have these write the stacks of all their threads into their logs."""
    for seat in cluster.seats:
        if seat.name in names and seat.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(seat.pid, signal.SIGUSR1)
    await asyncio.sleep(0.5)


def _owned(pid: int) -> bool:
    """Whether somebody here waits for it."""
    return pid in {one.pid for one in multiprocessing.active_children()}
