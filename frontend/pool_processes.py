"""What the processes of a pool use of the machine, as one: the `process_*` metrics, summed.

Prometheus' multiprocess mode leaves them out. They are read when /metrics is, of each process that lives: the members,
found by their sockets in the pool's folder, and their parent. What members that have ended had used stays in the sum of
CPU seconds, because the parent writes it down: a sum that fell would look like a restart.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from frontend.pool_peers import forget, member_pids

_ENDED_FILE = "ended_cpu_s"
_CPU = "process_cpu_seconds"
_START = "process_start_time_seconds"


class PoolProcesses(Collector):
    """All processes of the pool in a folder.

    Args:
        parent_pid: of the process that started the members.
    """

    def __init__(self, folder: Path, parent_pid: int) -> None:
        self._folder = folder
        self._parent_pid = parent_pid

    def collect(self) -> Iterator[Metric]:
        """The families that a single process has, with the earliest start and the sums of all else."""
        found: dict[str, list[float]] = {_CPU: [_ended_cpu_s(self._folder)]}
        families: dict[str, Metric] = {}
        for pid in (self._parent_pid, *member_pids(self._folder)):
            for family in _families_of(pid):
                families.setdefault(family.name, family)
                found.setdefault(family.name, []).append(family.samples[0].value)
        for name, family in families.items():
            whole = Metric(name, family.documentation, family.type)
            whole.add_sample(family.samples[0].name, {}, (min if name == _START else sum)(found[name]))
            yield whole


def note_ended(folder: Path, pid: int) -> None:
    """A member has ended, and its parent, who says so here, has waited for it."""
    forget(folder, pid)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    new = folder / f"{_ENDED_FILE}.new"
    new.write_text(repr(used.ru_utime + used.ru_stime))
    new.rename(folder / _ENDED_FILE)


def _ended_cpu_s(folder: Path) -> float:
    try:
        return float((folder / _ENDED_FILE).read_text())
    except FileNotFoundError:
        return 0.0


def _families_of(pid: int) -> list[Metric]:
    """None of a process that has just ended."""
    return list(ProcessCollector(pid=lambda: pid, registry=None).collect())
