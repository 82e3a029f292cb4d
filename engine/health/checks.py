"""What is wrong with a GPU, from its readings: one rule a paragraph, with the limits of `health` in the settings.

The limits that are not settings are NVIDIA's: 8 PCIe replays within a minute are what its data center manager (DCGM)
warns of, and 60 retired pages are its condition for taking a GPU back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from engine.health.findings import FOR_GOOD, SICK, SUSPECT, Finding, Growth
from engine.health.readings import DeviceReading, Readings, XidEvent
from engine.health.xids import XidKind, kind_of, meaning_of
from slipstream.worker_settings import HealthSettings

HOUR_S, MINUTE_S = 3600.0, 60.0
MOST_RETIRED_PAGES = 60
BUSY = 0.05
"""Below this use a GPU is idle: it lowers its PCIe link to save power then, and that is no fault."""
SLOWDOWNS = {
    "hw_thermal": "it is too hot",
    "sw_thermal": "it is hot",
    "hw_power_brake": "its power supply asks it to slow down",
    "hw_slowdown": "its hardware slows it down",
}
"""A power cap (`power_cap`) is how a GPU at full load should be: no fault."""


class DeviceChecks:
    """The rules for some devices; remembers what counters were."""

    def __init__(self, limits: HealthSettings) -> None:
        self._limits = limits
        self._growth: dict[tuple[str, str], Growth] = {}
        self._first: dict[str, DeviceReading] = {}
        self._xids: dict[str, deque[tuple[float, int]]] = {}

    def findings(self, readings: Readings, now_s: float) -> list[Finding]:
        """What is wrong at this moment."""
        found = [finding for event in readings.events for finding in self._xid(event, now_s)]
        for one in readings.devices:
            found += self._of(one, now_s)
        found += self._repeated_xids(now_s)
        return found

    def _of(self, one: DeviceReading, now_s: float) -> Iterator[Finding]:
        place = f"GPU {one.index}"
        if one.lost:
            text = f"{place} has fallen off the bus: {one.failure}"
            yield Finding("gpu_lost", SICK, text, one.uuid, keep_s=FOR_GOOD)
            return
        if one.failure:
            text = f"{place} does not answer: {one.failure}"
            yield Finding("gpu_unreadable", SUSPECT, text, one.uuid)
            yield Finding("gpu_unreadable_long", SICK, text, one.uuid, hold_s=self._limits.silence_s)
            return
        first = self._first.setdefault(one.uuid, one)
        yield from self._memory(one, first, place, now_s)
        yield from self._slowed(one, place)
        yield from self._bus(one, place, now_s)
        yield from self._links(one, first, place, now_s)
        if one.recovery_action:
            text = f"{place}: its driver asks for a {one.recovery_action}"
            yield Finding("gpu_recovery", SICK, text, one.uuid, keep_s=FOR_GOOD)

    def _memory(self, one: DeviceReading, first: DeviceReading, place: str, now_s: float) -> Iterator[Finding]:
        errors, before = one.ecc_uncorrected or 0, first.ecc_uncorrected or 0
        if errors > before:
            text = f"{place}: {errors - before} uncorrectable memory errors since this worker began"
            yield Finding("ecc_uncorrected", SICK, text, one.uuid, keep_s=FOR_GOOD)
        elif errors:
            text = f"{place}: {errors} uncorrectable memory errors since its driver was loaded"
            yield Finding("ecc_uncorrected_before", SUSPECT, text, one.uuid)
        corrected = self._grown("ecc_corrected", one.uuid, one.ecc_corrected, HOUR_S, now_s)
        if corrected >= self._limits.corrected_errors_per_hour:
            text = f"{place}: {corrected} corrected memory errors within an hour"
            yield Finding("ecc_corrected", SUSPECT, text, one.uuid)
        if one.remap_failed:
            text = f"{place}: a bad row of its memory cannot be replaced any more"
            yield Finding("remap_failed", SICK, text, one.uuid, keep_s=FOR_GOOD)
        if one.remap_pending or one.retire_pending:
            text = f"{place}: bad memory is replaced with its next reset"
            yield Finding("remap_pending", SUSPECT, text, one.uuid)
        if (one.retired_pages or 0) >= MOST_RETIRED_PAGES:
            text = f"{place}: {one.retired_pages} retired pages of memory, and {MOST_RETIRED_PAGES} are the limit"
            yield Finding("pages_retired", SICK, text, one.uuid, keep_s=FOR_GOOD)

    def _slowed(self, one: DeviceReading, place: str) -> Iterator[Finding]:
        why = [text for reason, text in SLOWDOWNS.items() if reason in (one.throttling or ())]
        if not why:
            return
        heat = f" ({one.temperature_c} °C)" if one.temperature_c is not None else ""
        text = f"{place} runs slower than it could: {', '.join(why)}{heat}"
        yield Finding("throttled", SUSPECT, text, one.uuid, hold_s=self._limits.throttle_suspect_s)
        text = f"{text}, for {self._limits.throttle_sick_s:g} s and more"
        yield Finding("throttled_long", SICK, text, one.uuid, hold_s=self._limits.throttle_sick_s)

    def _bus(self, one: DeviceReading, place: str, now_s: float) -> Iterator[Finding]:
        replays = self._grown("pcie_replays", one.uuid, one.pcie_replays, MINUTE_S, now_s)
        if replays >= self._limits.pcie_replays_per_minute:
            text = f"{place}: {replays} PCIe packets were sent again within a minute"
            yield Finding("pcie_replays", SUSPECT, text, one.uuid)
        busy = one.busy is not None and one.busy >= BUSY
        for name, now, most in (
            ("lanes", one.pcie_width, one.pcie_width_most),
            ("generation", one.pcie_generation, one.pcie_generation_most),
        ):
            if busy and now is not None and most is not None and now < most:
                text = f"{place}: its PCIe link has {name} {now} of {most}"
                yield Finding(f"pcie_{name}", SUSPECT, text, one.uuid, hold_s=self._limits.link_suspect_s)

    def _links(self, one: DeviceReading, first: DeviceReading, place: str, now_s: float) -> Iterator[Finding]:
        was_active = {link.number for link in first.links if link.active}
        down = sorted(was_active - {link.number for link in one.links if link.active})
        if down and one.links:
            text = f"{place}: NVLink {', '.join(map(str, down))} went down"
            yield Finding("nvlink_down", SICK, text, one.uuid)
        for link in one.links:
            errors = self._grown(f"nvlink {link.number}", one.uuid, link.errors, MINUTE_S, now_s)
            if errors >= self._limits.link_errors_per_minute:
                text = f"{place}: {errors} errors of NVLink {link.number} within a minute"
                yield Finding("nvlink_errors", SUSPECT, text, f"{one.uuid}/{link.number}")

    def _xid(self, event: XidEvent, now_s: float) -> Iterator[Finding]:
        kind, text = kind_of(event.xid), f"the driver reported Xid {event.xid}: {meaning_of(event.xid)}"
        code = f"xid_{event.xid}"
        if kind is XidKind.DEVICE:
            yield Finding(code, SICK, text, event.uuid, keep_s=FOR_GOOD)
        elif kind is XidKind.APPLICATION:
            self._xids.setdefault(event.uuid, deque()).append((now_s, event.xid))
            yield Finding(code, SUSPECT, text, event.uuid)
        elif kind is XidKind.UNKNOWN:
            yield Finding(code, SUSPECT, text, event.uuid)

    def _repeated_xids(self, now_s: float) -> Iterator[Finding]:
        for uuid, past in self._xids.items():
            while past and past[0][0] <= now_s - HOUR_S:
                past.popleft()
            if len(past) >= self._limits.application_xids_per_hour:
                numbers = ", ".join(str(xid) for xid in sorted({xid for _, xid in past}))
                text = f"{len(past)} Xids ({numbers}) within an hour: more than a process' fault"
                yield Finding("xids_repeated", SICK, text, uuid)

    def _grown(self, name: str, uuid: str, value: int | None, window_s: float, now_s: float) -> int:
        growth = self._growth.get((name, uuid))
        if growth is None:
            growth = self._growth[name, uuid] = Growth(window_s)
        return growth.add(value, now_s)


def silence(asked_s: float | None, now_s: float, limits: HealthSettings) -> Sequence[Finding]:
    """A question to the driver that is not answered: drivers hang on devices that are very sick.

    Args:
        asked_s: when; None: nothing is asked now.
    """
    waited_s = now_s - asked_s if asked_s is not None else 0.0
    if waited_s < min(limits.silence_s, 2 * limits.interval_s):
        return ()
    state = SICK if waited_s >= limits.silence_s else SUSPECT
    return (Finding("nvml_silent", state, f"NVML has not answered for {waited_s:.0f} s"),)
