"""What was read of a GPU at one moment, and where readings come from.

A field is None where the device, or its driver, does not tell: nothing is concluded from it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Link:
    """One NVLink. `errors`: replays, recoveries and bad packets since the driver was loaded."""

    number: int
    active: bool
    errors: int


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One GPU now.

    Attributes:
        index, uuid, name: as NVML tells them; the index is that of the machine, whatever CUDA was made to see.
        lost: it does not answer any more ("fell off the bus").
        failure: why nothing could be read, where that was not it.
        ecc_corrected, ecc_uncorrected: since the driver was loaded.
        rows_remapped_corrected, rows_remapped_uncorrected: of its memory, for ever; by what made them bad.
        remap_pending: a bad row is replaced with the next reset; remap_failed: there was no spare row.
        retired_pages: of GPUs before Ampere; retire_pending: one more with the next reset.
        throttling: the reasons for which its clocks are lowered now, of `slipstream`'s names for NVML's.
        slowdown_c: the temperature from which it slows itself down.
        pcie_replays: packets sent again since the driver was loaded.
        pcie_generation, pcie_width: of the link now; the other two are what device and machine can do.
        recovery_action: what the driver wants done: `reset`, `reboot` or `drain`; empty: nothing.
    """

    index: int
    uuid: str
    name: str = ""
    lost: bool = False
    failure: str = ""
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    rows_remapped_corrected: int | None = None
    rows_remapped_uncorrected: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    retired_pages: int | None = None
    retire_pending: bool | None = None
    throttling: frozenset[str] | None = None
    temperature_c: int | None = None
    slowdown_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    busy: float | None = None
    pcie_replays: int | None = None
    pcie_generation: int | None = None
    pcie_generation_most: int | None = None
    pcie_width: int | None = None
    pcie_width_most: int | None = None
    links: tuple[Link, ...] = ()
    recovery_action: str | None = None


@dataclass(frozen=True, slots=True)
class XidEvent:
    """The driver reported an error of a device."""

    uuid: str
    xid: int


@dataclass(frozen=True, slots=True)
class Readings:
    """All watched devices, and what their driver reported since the last readings."""

    devices: tuple[DeviceReading, ...] = ()
    events: tuple[XidEvent, ...] = ()


class DeviceHealth(Protocol):
    """Some GPUs that are watched. Its calls may block, for long where a device is sick: not for an event loop."""

    @property
    def uuids(self) -> Sequence[str]:
        """Of the watched devices."""
        ...

    def read(self) -> Readings:
        """How they are now. What fails is in the readings."""
        ...

    def close(self) -> None:
        """Let go of the driver."""
        ...


class NoDevices:
    """A `DeviceHealth` of a worker that computes on a CPU, or on a machine without NVML."""

    uuids: Sequence[str] = ()

    def read(self) -> Readings:
        return Readings()

    def close(self) -> None:
        return None
