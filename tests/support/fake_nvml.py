"""NVML without a GPU: `pynvml`'s own constants, errors and structures, with functions that answer from a table.

The values of `H100` and `H200` are written from NVIDIA's documentation (NVML's API reference, the data sheets of the
boards, and what `nvidia-smi -q` shows of a healthy one); they were not recorded on a device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

LINKS = 18


@dataclass
class FakeGpu:
    """One GPU's answers; an exception in place of a value is raised. `name`: as NVML tells it."""

    name: str
    uuid: str
    index: int = 0
    temperature: Any = 34
    slowdown: Any = 92
    power_mw: Any = 118_000
    power_limit_mw: Any = 700_000
    corrected: Any = 0
    uncorrected: Any = 0
    # Corrected, uncorrected, pending, failure: nvmlDeviceGetRemappedRows.
    remapped: Any = (0, 0, 0, 0)
    retired: Any = field(default_factory=lambda: pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
    throttle: Any = 0
    busy: int = 0
    replays: Any = 0
    generation: int = 5
    generation_most: int = 5
    width: int = 16
    width_most: int = 16
    links: int = LINKS
    links_down: set[int] = field(default_factory=set)
    link_errors: dict[int, int] = field(default_factory=dict)
    recovery: Any = 0
    lost: bool = False


def h100(number: int = 0) -> FakeGpu:
    """An idle H100 SXM5 80GB: 700 W, PCIe 5 x16, 18 NVLinks."""
    return FakeGpu("NVIDIA H100 80GB HBM3", f"GPU-8a5c0b1e-0000-4b1c-9d20-00000000000{number}", number)


def h200(number: int = 0) -> FakeGpu:
    """A busy H200 SXM 141GB under its power cap, as one is at full load."""
    return FakeGpu(
        "NVIDIA H200",
        f"GPU-1f6d2c3a-0000-4e55-8d7e-00000000000{number}",
        number,
        temperature=61,
        slowdown=95,
        power_mw=694_000,
        throttle=pynvml.nvmlClocksEventReasonSwPowerCap,
        busy=99,
    )


class FakeNvml:
    """The functions of `pynvml` that are used here, over some `FakeGpu`s. Everything else of it is the real one."""

    def __init__(self, *gpus: FakeGpu, driver: bool = True) -> None:
        self.gpus = list(gpus)
        self.events: deque[tuple[FakeGpu, int]] = deque()
        self.registered: list[str] = []
        self.running = 0
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        found = getattr(pynvml, name)
        if name.startswith("nvml") and callable(found):
            raise AssertionError(f"{name} is asked, and this library has no answer")
        return found

    def xid(self, gpu: FakeGpu, number: int) -> None:
        """The driver reports one."""
        self.events.append((gpu, number))

    def nvmlInit(self) -> None:  # noqa: N802
        if not self._driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.running += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.running -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        if index >= len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.uuid

    def nvmlDeviceGetIndex(self, gpu: FakeGpu) -> int:  # noqa: N802
        return int(_of(gpu, gpu.index))

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:  # noqa: N802
        return str(_of(gpu, gpu.name))

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: int) -> Any:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return _of(gpu, gpu.temperature)

    def nvmlDeviceGetTemperatureThreshold(self, gpu: FakeGpu, threshold: int) -> Any:  # noqa: N802
        assert threshold == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return _of(gpu, gpu.slowdown)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.power_mw)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.power_limit_mw)

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, kind: int, counter: int) -> Any:  # noqa: N802
        assert counter == pynvml.NVML_VOLATILE_ECC
        corrected = kind == pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
        return _of(gpu, gpu.corrected if corrected else gpu.uncorrected)

    def nvmlDeviceGetRemappedRows(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.remapped)

    def nvmlDeviceGetRetiredPages(self, gpu: FakeGpu, cause: int) -> Any:  # noqa: N802
        pages = _of(gpu, gpu.retired)
        return pages if cause == pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR else []

    def nvmlDeviceGetRetiredPagesPendingStatus(self, gpu: FakeGpu) -> Any:  # noqa: N802
        _of(gpu, gpu.retired)
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.throttle)

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, SimpleNamespace(gpu=gpu.busy, memory=gpu.busy))

    def nvmlDeviceGetPcieReplayCounter(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.replays)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.generation)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.generation_most)

    def nvmlDeviceGetCurrPcieLinkWidth(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.width)

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return _of(gpu, gpu.width_most)

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> Any:  # noqa: N802
        if link >= gpu.links:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return _of(gpu, int(link not in gpu.links_down))

    def nvmlDeviceGetNvLinkErrorCounter(self, gpu: FakeGpu, link: int, counter: int) -> Any:  # noqa: N802
        return _of(gpu, gpu.link_errors.get(link, 0) if counter == pynvml.NVML_NVLINK_ERROR_DL_REPLAY else 0)

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[int]) -> Any:  # noqa: N802
        assert fields == [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        values = (pynvml.c_nvmlFieldValue_t * 1)()
        values[0].value.uiVal = _of(gpu, gpu.recovery)
        return values

    def nvmlEventSetCreate(self) -> object:  # noqa: N802
        return object()

    def nvmlEventSetFree(self, events: object) -> None:  # noqa: N802
        return None

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, types: int, events: object) -> None:  # noqa: N802
        assert types == pynvml.nvmlEventTypeXidCriticalError
        self.registered.append(gpu.uuid)

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> Any:  # noqa: N802
        assert timeout_ms == 0, "nobody waits"
        if not self.events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        gpu, number = self.events.popleft()
        return SimpleNamespace(device=gpu, eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=number)


def _of(gpu: FakeGpu, value: Any) -> Any:
    if gpu.lost:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    if isinstance(value, Exception):
        raise value
    return value
