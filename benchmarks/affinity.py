"""Which CPUs the threads of a running server may use: as the kernel says, and set from outside."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# Threads may be started while others are being moved; those inherit from theirs, so a second look finds the last.
_PASSES = 3


@dataclass(frozen=True, slots=True)
class BusyThread:
    """A thread and what it took so far.

    Attributes:
        cpus: that it may run on, such as `0` or `0-1`.
        cpu_s: since it was started.
    """

    name: str
    cpus: str
    cpu_s: float


def threads_by_cpus(pid: int) -> dict[str, int]:
    """How many threads of a process and of all that it has started may use which CPUs."""
    counted = Counter(span(os.sched_getaffinity(thread)) for thread in _seen(pid))
    return dict(sorted(counted.items()))


def confine(pid: int, cpus: Collection[int]) -> None:
    """Lets every thread of a process, and of all that it has started, run on these CPUs and no others."""
    for _ in range(_PASSES):
        for thread in _seen(pid):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cpus)


def busiest_threads(pid: int, count: int) -> list[BusyThread]:
    """Those of a process and its children that took most CPU time, the busiest first."""
    found = []
    for process in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            for thread in process.threads():
                name = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().strip()
                cpus = span(os.sched_getaffinity(thread.id))
                found.append(BusyThread(name, cpus, round(thread.user_time + thread.system_time, 2)))
    return sorted(found, key=lambda thread: thread.cpu_s, reverse=True)[:count]


def span(cpus: Collection[int]) -> str:
    """CPUs as the kernel writes them: `0-3,8`."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and cpu == spans[-1][-1] + 1:
            spans[-1][1:] = [cpu]
        else:
            spans.append([cpu])
    return ",".join("-".join(map(str, ends)) for ends in spans)


def _seen(pid: int) -> Iterator[int]:
    for process in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield from [thread.id for thread in process.threads()]


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    return []
