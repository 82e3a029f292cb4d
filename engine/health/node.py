"""The node around a worker: whether it waits for memory, and whether the disk of the model cache is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.health.findings import SUSPECT, Finding
from slipstream.worker_settings import HealthSettings

PRESSURE = Path("/proc/pressure/memory")


@dataclass(frozen=True, slots=True)
class NodeReading:
    """The node now; None: not told.

    Attributes:
        memory_pressure: share of the last minute in which all of its work waited for memory (PSI, `full avg60`).
        disk_free_bytes: where models are cached, for whoever is not root.
    """

    memory_pressure: float | None = None
    disk_free_bytes: int | None = None


def read_node(cache: Path, pressure: Path = PRESSURE) -> NodeReading:
    """How it is now."""
    try:
        told = parse_pressure(pressure.read_text())
    except OSError:  # no PSI in this kernel, or in this container
        told = None
    return NodeReading(told, _free_bytes(cache))


def parse_pressure(text: str) -> float | None:
    """The share of `full avg60`, of what /proc/pressure/memory says."""
    for line in text.splitlines():
        kind, *fields = line.split()
        values = dict(field.split("=", 1) for field in fields if "=" in field)
        if kind == "full" and "avg60" in values:
            return float(values["avg60"]) / 100
    return None


def findings(reading: NodeReading, limits: HealthSettings) -> Iterator[Finding]:
    """What is wrong with it: worth a look, and no reason to take a worker away."""
    pressure, free = reading.memory_pressure, reading.disk_free_bytes
    if pressure is not None and pressure >= limits.memory_pressure:
        text = f"for {pressure:.0%} of the last minute all work on this node waited for memory"
        yield Finding("memory_pressure", SUSPECT, text)
    if free is not None and free < limits.disk_free_bytes:
        text = f"the disk of the model cache has {free / (1 << 20):.0f} MiB free (health.disk_free_bytes)"
        yield Finding("disk_full", SUSPECT, text)


def _free_bytes(folder: Path) -> int | None:
    """On the disk that holds the folder, or will."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
