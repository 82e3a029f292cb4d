"""A worker's watch over its device and node: reads each few seconds, judges, and has it told when something changed.

Questions to the driver run in a thread of their own, one at a time: a driver may not answer for minutes when a device
is very sick, and that is a finding too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from engine.health import checks, node, told
from engine.health.findings import Finding
from engine.health.policy import HealthPolicy, Verdict
from engine.health.readings import DeviceHealth, DeviceReading, NoDevices, Readings
from slipstream import telemetry
from slipstream.v1.registry_pb2 import Health, HealthReason, HealthState
from slipstream.worker_settings import HealthSettings

log = telemetry.get_logger(__name__)

MAX_REASONS = 8
MAX_TEXT_CHARS = 240

OpenDevices = Callable[[], DeviceHealth]
"""May block, and is called in the watch's thread."""


@dataclass(slots=True)
class _Asking:
    """The thread's side: one question at a time, and its answer."""

    open: OpenDevices
    devices: DeviceHealth = field(default_factory=NoDevices)
    asked_s: float | None = None
    answer: Readings | None = None
    opened: bool = False


class HealthWatch:
    """Watches while `follow` runs; `verdict`, `readings` and `message` are of the last look.

    Args:
        open_devices: the GPUs to watch.
        cache: where models are cached.
        on_change: called when the state or its reasons are others than before.

    Attributes:
        verdict: None before the first look.
        xids: of each device, how many of which number were seen; latest: the last one.
    """

    def __init__(
        self,
        limits: HealthSettings,
        worker_id: str,
        open_devices: OpenDevices,
        *,
        cache: Path,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits
        self._worker_id = worker_id
        self._cache = cache
        self._on_change = on_change
        self._clock = clock
        self._unix_clock = unix_clock
        self._asking = _Asking(open_devices)
        self._checks = checks.DeviceChecks(limits)
        self._policy = HealthPolicy(limits.clear_s)
        self.verdict: Verdict | None = None
        self.readings: Sequence[DeviceReading] = ()
        self.node = node.NodeReading()
        self.xids: dict[tuple[str, int], int] = {}
        self.latest_xid: dict[str, int] = {}

    async def follow(self) -> NoReturn:
        """Look again and again. Runs until cancelled."""
        try:
            while True:
                self._ask_devices()
                # What is answered at once is judged at once.
                await asyncio.sleep(min(0.05, self._limits.interval_s))
                await self.look()
                await asyncio.sleep(self._limits.interval_s)
        finally:
            self._end_asking()

    async def look(self) -> Verdict:
        """Judge by what is known now."""
        now_s = self._clock()
        readings = self._take_answer()
        found: list[Finding] = list(checks.silence(self._asking.asked_s, now_s, self._limits))
        if readings is not None:
            self.readings = readings.devices
            for event in readings.events:
                self.xids[event.uuid, event.xid] = self.xids.get((event.uuid, event.xid), 0) + 1
                self.latest_xid[event.uuid] = event.xid
                log.warning("xid", device=event.uuid, xid=event.xid)
            found += self._checks.findings(readings, now_s)
        self.node = await asyncio.to_thread(node.read_node, self._cache)
        found += node.findings(self.node, self._limits)
        if self._limits.file is not None:
            found += await asyncio.to_thread(told.read_told, self._limits.file, self._worker_id)
        self._take(self._policy.judge(found, now_s))
        assert self.verdict is not None
        return self.verdict

    def message(self) -> Health:
        """What the worker's record says of it."""
        verdict = self.verdict
        if verdict is None:
            return Health()
        age_s = self._clock() - verdict.since_s
        return Health(
            state=verdict.state,
            reasons=[
                HealthReason(code=one.code, state=one.state, text=_shown(one.text))
                for one in verdict.reasons[:MAX_REASONS]
            ],
            since_unix_s=int(self._unix_clock() - age_s),
            devices=len(self._asking.devices.uuids),
            device_ids=list(self._asking.devices.uuids)[:16],
        )

    def _take(self, verdict: Verdict) -> None:
        before, self.verdict = self.verdict, verdict
        if before is not None and (before.state, before.reasons) == (verdict.state, verdict.reasons):
            return
        if before is None or before.state != verdict.state:
            say = log.info if verdict.state == HealthState.HEALTHY else log.warning
            say("health", state=HealthState.Name(verdict.state).lower(), reasons=[one.text for one in verdict.reasons])
        self._on_change()

    def _ask_devices(self) -> None:
        """Begin to read the devices, unless the last question is still open."""
        asking = self._asking
        if asking.asked_s is not None or (asking.opened and not asking.devices.uuids):
            return
        asking.asked_s = self._clock()
        threading.Thread(target=_answer, args=(asking,), name="device-health", daemon=True).start()

    def _take_answer(self) -> Readings | None:
        asking = self._asking
        answer = asking.answer
        if answer is not None:
            asking.answer = asking.asked_s = None
        return answer

    def _end_asking(self) -> None:
        asking = self._asking
        idle = asking.asked_s is None or asking.answer is not None
        if asking.opened and idle:
            asking.devices.close()  # at once, or never: nobody waits for a driver that hangs


def _answer(asking: _Asking) -> None:
    try:
        if not asking.opened:
            asking.devices = asking.open()
            asking.opened = True
        asking.answer = asking.devices.read()
    except Exception as error:  # whatever a driver's library raises: a worker does not end for it
        log.exception("device_health_failed")
        asking.answer = Readings((DeviceReading(0, "", failure=str(error)),))


def _shown(text: str) -> str:
    """As the registry takes it: a record with a driver's control characters in it would be refused as a whole."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:MAX_TEXT_CHARS])


def cache_folder() -> Path:
    """Where Hugging Face's library caches models."""
    home = os.environ.get("HF_HOME")
    with contextlib.suppress(RuntimeError):  # no home folder
        return Path(home) if home else Path.home() / ".cache" / "huggingface"
    return Path("/")
