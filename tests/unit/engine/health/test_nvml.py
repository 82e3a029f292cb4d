"""GPUs through NVML: the real adapter over `pynvml`'s names, with answers from a table; and live where there is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed (extra `engine`)")

from engine.health import nvml as adapter  # noqa: E402
from engine.health.nvml import NvmlDevices, open_devices, visible_names  # noqa: E402
from engine.health.readings import DeviceReading, NoDevices, XidEvent  # noqa: E402
from tests.support.fake_nvml import LINKS, FakeGpu, FakeNvml, h100, h200  # noqa: E402


def opened(*gpus: FakeGpu) -> tuple[FakeNvml, NvmlDevices]:
    library = FakeNvml(*gpus)
    devices = open_devices(None, len(gpus), nvml=library)
    assert isinstance(devices, NvmlDevices)
    return library, devices


def read_one(gpu: FakeGpu) -> DeviceReading:
    (reading,) = opened(gpu)[1].read().devices
    return reading


def test_all_names_that_are_used_are_names_of_the_library() -> None:
    """The fake cannot tell: a name that it answers to need not be one of NVIDIA's."""
    used = set(re.findall(r"nvml\.(\w+)|\"((?:nvml|NVML_)\w+)\"", Path(adapter.__file__).read_text()))
    names = {name for pair in used for name in pair if name}
    assert len(names) > 40
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []


def test_a_healthy_h100_is_read_whole() -> None:
    reading = read_one(h100())
    assert (reading.index, reading.name, reading.lost, reading.failure) == (0, "NVIDIA H100 80GB HBM3", False, "")
    assert (reading.ecc_corrected, reading.ecc_uncorrected) == (0, 0)
    assert (reading.remap_pending, reading.remap_failed) == (False, False)
    assert (reading.temperature_c, reading.slowdown_c, reading.power_w, reading.power_limit_w) == (34, 92, 118, 700)
    assert (reading.pcie_generation, reading.pcie_width, reading.throttling) == (5, 16, frozenset())
    assert len(reading.links) == LINKS
    assert all(link.active and link.errors == 0 for link in reading.links)
    assert reading.recovery_action == ""
    assert reading.retired_pages is None, "GPUs since Ampere remap rows and retire no pages"


def test_a_busy_h200_at_its_power_cap_says_so() -> None:
    reading = read_one(h200())
    assert (reading.busy, reading.throttling) == (0.99, frozenset({"power_cap"}))


def test_what_a_device_does_not_tell_is_left_out() -> None:
    """An A10 without ECC, NVLink and events, as its driver answers: NOT_SUPPORTED."""
    none = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    gpu = h100()
    gpu.links, gpu.corrected, gpu.uncorrected, gpu.remapped, gpu.temperature = 0, none, none, none, none
    reading = read_one(gpu)
    assert not reading.lost
    assert not reading.failure
    assert (reading.ecc_corrected, reading.remap_pending, reading.temperature_c, reading.links) == (
        None,
        None,
        None,
        (),
    )


def test_a_lost_device_is_named_by_what_was_known_of_it() -> None:
    gpus = h100(0), h100(1)
    _, devices = opened(*gpus)
    devices.read()
    gpus[1].lost = True
    well, lost = devices.read().devices
    assert not well.lost
    assert (lost.lost, lost.index, lost.name) == (True, 1, "NVIDIA H100 80GB HBM3")
    assert "lost" in lost.failure.lower()


def test_a_device_that_cannot_be_read_is_not_taken_for_lost() -> None:
    gpu = h100()
    gpu.temperature = pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
    reading = read_one(gpu)
    assert (reading.lost, bool(reading.failure)) == (False, True)


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (pynvml.nvmlClocksThrottleReasonHwThermalSlowdown, {"hw_thermal"}),
        (pynvml.nvmlClocksEventReasonSwThermalSlowdown, {"sw_thermal"}),
        (
            pynvml.nvmlClocksThrottleReasonHwSlowdown | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
            {"hw_slowdown", "hw_power_brake"},
        ),
        (pynvml.nvmlClocksThrottleReasonGpuIdle, set()),
    ],
)
def test_reasons_of_lowered_clocks_have_names(bits: int, reasons: set[str]) -> None:
    gpu = h100()
    gpu.throttle = bits
    assert read_one(gpu).throttling == frozenset(reasons)


def test_xids_come_once_with_their_device() -> None:
    first, second = h100(0), h100(1)
    library, devices = opened(first, second)
    assert library.registered == [first.uuid, second.uuid]
    library.xid(second, 94)
    library.xid(second, 48)
    assert devices.read().events == (XidEvent(second.uuid, 94), XidEvent(second.uuid, 48))
    assert devices.read().events == ()


def test_the_driver_s_own_advice_is_read() -> None:
    gpu = h100()
    gpu.recovery = pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT
    assert read_one(gpu).recovery_action == "reboot"


def test_retired_pages_of_older_devices_are_counted() -> None:
    gpu = h100()
    gpu.retired = [1, 2, 3]
    assert (read_one(gpu).retired_pages, read_one(gpu).retire_pending) == (3, False)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1", "2", "3"]),
        ("2,0", ["2", "0"]),
        ("GPU-1,MIG-2", ["GPU-1", "MIG-2"]),
        ("1,9,0", ["1"]),
        ("", []),
        ("-1", []),
    ],
)
def test_visible_devices_are_those_of_cuda(visible: str | None, names: list[str]) -> None:
    assert visible_names(visible, 4) == names


def test_only_the_worker_s_own_devices_are_watched() -> None:
    library = FakeNvml(h100(0), h100(1), h100(2))
    devices = open_devices("2,1", 1, nvml=library)
    assert list(devices.uuids) == [library.gpus[2].uuid]
    by_uuid = open_devices(library.gpus[1].uuid, 1, nvml=library)
    assert list(by_uuid.uuids) == [library.gpus[1].uuid]


@pytest.mark.parametrize("library", [FakeNvml(driver=False), FakeNvml()], ids=["no driver", "no device"])
def test_without_a_device_there_is_nothing_to_watch(library: FakeNvml) -> None:
    devices = open_devices(None, 1, nvml=library)
    assert isinstance(devices, NoDevices)
    assert devices.read().devices == ()
    assert library.running == 0


def test_closing_lets_go_of_the_library() -> None:
    library, devices = opened(h100())
    devices.close()
    assert library.running == 0


def test_a_real_gpu_is_read_live() -> None:
    devices = open_devices(None, 64)
    if isinstance(devices, NoDevices):
        pytest.skip("no NVIDIA GPU and driver on this machine: nothing to read live")
    try:
        for reading in devices.read().devices:
            assert reading.uuid.startswith("GPU-")
            assert not reading.lost
            assert reading.temperature_c is None or 0 < reading.temperature_c < 120
    finally:
        devices.close()
