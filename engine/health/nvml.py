"""GPUs as NVIDIA's management library tells of them (`nvidia-ml-py`, imported as `pynvml`).

Every figure is asked for by itself: a driver that does not know one, or a device that does not have it, leaves that one
out. A device that is lost says so to the first question, and is asked nothing more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from engine.health.readings import DeviceHealth, DeviceReading, Link, NoDevices, Readings, XidEvent
from slipstream import telemetry

log = telemetry.get_logger(__name__)

T = TypeVar("T")

MAX_EVENTS = 256
"""Taken up in one reading; what is more waits for the next one."""

THROTTLE_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power_cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hw_slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "sw_thermal",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "hw_thermal",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "hw_power_brake",
}
_LINK_ERRORS = ("NVML_NVLINK_ERROR_DL_REPLAY", "NVML_NVLINK_ERROR_DL_RECOVERY", "NVML_NVLINK_ERROR_DL_CRC_FLIT")
_RETIRED = (
    "NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS",
    "NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR",
)
_RECOVERY = {
    "NVML_GPU_RECOVERY_ACTION_GPU_RESET": "reset",
    "NVML_GPU_RECOVERY_ACTION_NODE_REBOOT": "reboot",
    "NVML_GPU_RECOVERY_ACTION_DRAIN_P2P": "drain",
    "NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET": "drain",
}


class NvmlDevices:
    """A `DeviceHealth` of some of the machine's GPUs.

    Args:
        nvml: the library; `pynvml`, or what has its functions, constants and errors.
        handles: of the devices, by UUID.
    """

    def __init__(self, nvml: Any, handles: Mapping[str, Any]) -> None:
        self._nvml = nvml
        self._handles = dict(handles)
        self._errors: type[Exception] = nvml.NVMLError
        self._last: dict[str, DeviceReading] = {}
        self._most_links: dict[str, int] = {}
        self._events = self._subscribe()

    @property
    def uuids(self) -> Sequence[str]:
        return tuple(self._handles)

    def read(self) -> Readings:
        """See `DeviceHealth.read`."""
        events = self._take_events()
        devices = []
        for number, (uuid, handle) in enumerate(self._handles.items()):
            reading = self._read_device(number, uuid, handle)
            if not reading.lost and not reading.failure:
                self._last[uuid] = reading
            devices.append(reading)
        return Readings(tuple(devices), tuple(events))

    def close(self) -> None:
        if self._events is not None:
            self._ask(self._nvml.nvmlEventSetFree, self._events)
        self._ask(self._nvml.nvmlShutdown)

    def _read_device(self, number: int, uuid: str, handle: Any) -> DeviceReading:
        nvml, known = self._nvml, self._last.get(uuid)
        index, name = (known.index, known.name) if known else (number, "")
        try:
            index = nvml.nvmlDeviceGetIndex(handle)
            name = nvml.nvmlDeviceGetName(handle)
            temperature_c = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        except self._errors as error:
            if _code(error) in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                return DeviceReading(index, uuid, name, lost=True, failure=str(error))
            if _code(error) != nvml.NVML_ERROR_NOT_SUPPORTED:
                return DeviceReading(index, uuid, name, failure=str(error))
            temperature_c = None
        corrected, uncorrected, pending, failed = self._ask(nvml.nvmlDeviceGetRemappedRows, handle) or (None,) * 4
        utilization = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        return DeviceReading(
            index,
            uuid,
            name,
            ecc_corrected=self._ecc(handle, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ecc_uncorrected=self._ecc(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            rows_remapped_corrected=corrected,
            rows_remapped_uncorrected=uncorrected,
            remap_pending=_truth(pending),
            remap_failed=_truth(failed),
            retired_pages=self._retired_pages(handle),
            retire_pending=_truth(self._ask(nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)),
            throttling=self._throttling(handle),
            temperature_c=temperature_c,
            slowdown_c=self._ask(
                nvml.nvmlDeviceGetTemperatureThreshold, handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
            power_w=_watts(self._ask(nvml.nvmlDeviceGetPowerUsage, handle)),
            power_limit_w=_watts(self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
            busy=utilization.gpu / 100 if utilization is not None else None,
            pcie_replays=self._ask(nvml.nvmlDeviceGetPcieReplayCounter, handle),
            pcie_generation=self._ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            pcie_generation_most=self._ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            pcie_width=self._ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            pcie_width_most=self._ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
            links=tuple(self._links(uuid, handle)),
            recovery_action=self._recovery_action(handle),
        )

    def _ecc(self, handle: Any, kind: int) -> int | None:
        return self._ask(self._nvml.nvmlDeviceGetTotalEccErrors, handle, kind, self._nvml.NVML_VOLATILE_ECC)

    def _retired_pages(self, handle: Any) -> int | None:
        lists = [
            self._ask(self._nvml.nvmlDeviceGetRetiredPages, handle, getattr(self._nvml, cause)) for cause in _RETIRED
        ]
        known = [len(pages) for pages in lists if pages is not None]
        return sum(known) if known else None

    def _throttling(self, handle: Any) -> frozenset[str] | None:
        bits = self._ask(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        if bits is None:
            return None
        return frozenset(name for mask, name in THROTTLE_REASONS.items() if bits & getattr(self._nvml, mask))

    def _links(self, uuid: str, handle: Any) -> list[Link]:
        """As many as the device has: the first that it does not know ends them."""
        nvml, links = self._nvml, []
        for number in range(self._most_links.get(uuid, nvml.NVML_NVLINK_MAX_LINKS)):
            active = self._ask(nvml.nvmlDeviceGetNvLinkState, handle, number)
            if active is None:
                self._most_links[uuid] = number
                break
            counts = [
                self._ask(nvml.nvmlDeviceGetNvLinkErrorCounter, handle, number, getattr(nvml, name))
                for name in _LINK_ERRORS
            ]
            links.append(Link(number, bool(active), sum(count or 0 for count in counts)))
        return links

    def _recovery_action(self, handle: Any) -> str | None:
        field = getattr(self._nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
        values = self._ask(self._nvml.nvmlDeviceGetFieldValues, handle, [field]) if field is not None else None
        if values is None or values[0].nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        action = values[0].value.uiVal
        return next((word for name, word in _RECOVERY.items() if getattr(self._nvml, name, None) == action), "")

    def _subscribe(self) -> Any:
        """An event set of all devices' Xids; None where the driver has no events (as on WSL)."""
        nvml = self._nvml
        events = self._ask(nvml.nvmlEventSetCreate)
        for uuid, handle in self._handles.items() if events is not None else ():
            try:
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except self._errors as error:
                log.info("xids_not_watched", device=uuid, reason=str(error))
        return events

    def _take_events(self) -> list[XidEvent]:
        nvml, found = self._nvml, list[XidEvent]()
        while self._events is not None and len(found) < MAX_EVENTS:
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._errors as error:
                if _code(error) == nvml.NVML_ERROR_GPU_IS_LOST:
                    break  # the readings say which
                if _code(error) != nvml.NVML_ERROR_TIMEOUT:
                    log.info("xids_not_read", reason=str(error))
                break
            if event.eventType & nvml.nvmlEventTypeXidCriticalError:
                found.append(XidEvent(self._uuid_of(event.device), int(event.eventData)))
        return found

    def _uuid_of(self, handle: Any) -> str:
        """Of an event's device, which has a handle of its own."""
        uuid = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
        if uuid in self._handles:
            return str(uuid)
        # It may be lost by now, and not tell its name: with one device there is no doubt.
        return next(iter(self._handles)) if len(self._handles) == 1 else ""

    def _ask(self, question: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return question(*arguments)
        except self._errors:
            return None


def open_devices(visible: str | None, count: int, *, nvml: Any = None) -> DeviceHealth:
    """The devices that a worker computes on; `NoDevices` where there is no NVML, or none of them.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None: not set.
        count: how many of the visible ones it uses.
        nvml: the library, if it is not to be imported.
    """
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        log.info("no_device_health", reason="nvidia-ml-py is not installed (extra `engine`)")
        return NoDevices()
    except nvml.NVMLError as error:
        log.info("no_device_health", reason=str(error))
        return NoDevices()
    handles = {}
    for name in visible_names(visible, nvml.nvmlDeviceGetCount())[:count]:
        try:
            handle = _handle(nvml, name)
            handles[str(nvml.nvmlDeviceGetUUID(handle))] = handle
        except nvml.NVMLError as error:
            log.warning("device_not_watched", device=name, reason=str(error))
    if not handles:
        nvml.nvmlShutdown()
        return NoDevices()
    return NvmlDevices(nvml, handles)


def visible_names(visible: str | None, there: int) -> list[str]:
    """Indices or UUIDs of the devices that CUDA sees, in its order. As CUDA does, ends at the first that is none."""
    if visible is None:
        return [str(number) for number in range(there)]
    names = []
    for name in (part.strip() for part in visible.split(",")):
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= there):
            break
        names.append(name)
    return names


def _handle(nvml: Any, name: str) -> Any:
    """Of an index, a UUID or a part of a GPU (MIG), which NVML names by its own UUID."""
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)


def _code(error: Exception) -> int:
    return int(getattr(error, "value", 0))


def _truth(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
