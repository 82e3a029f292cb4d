"""A worker's watch: what it makes of node, file and devices, and what its record and metrics say then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from engine.health import node, told
from engine.health.findings import SICK, SUSPECT
from engine.health.metrics import HealthCollector
from engine.health.readings import DeviceHealth, DeviceReading, Link, NoDevices, Readings, XidEvent
from engine.health.watch import HealthWatch
from slipstream.background import background
from slipstream.v1.registry_pb2 import HealthState
from slipstream.worker_settings import HealthSettings

PRESSURE = """some avg10=12.00 avg60=30.00 avg300=4.00 total=1234
full avg10=3.00 avg60=26.50 avg300=1.00 total=987
"""
GPU = DeviceReading(
    3,
    "GPU-a",
    "NVIDIA H100 80GB HBM3",
    ecc_corrected=5,
    ecc_uncorrected=0,
    remap_failed=False,
    throttling=frozenset({"power_cap"}),
    temperature_c=55,
    power_w=640.5,
    pcie_replays=2,
    links=(Link(0, True, 1), Link(1, False, 2)),
)


class Gpus:
    """Devices that answer what they are given; `hang` keeps the answer back."""

    def __init__(self) -> None:
        self.uuids: Sequence[str] = ("GPU-a",)
        self.now = Readings((GPU,))
        self.hang = threading.Event()
        self.hang.set()
        self.closed = False

    def read(self) -> Readings:
        self.hang.wait(timeout=20)
        return self.now

    def close(self) -> None:
        self.closed = True


class Time:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def watch(
    limits: HealthSettings, devices: DeviceHealth, tmp_path: Path, clock: Time, told_of: list[int] | None = None
) -> HealthWatch:
    changes = told_of if told_of is not None else []
    return HealthWatch(
        limits,
        "w-1",
        lambda: devices,
        cache=tmp_path,
        on_change=lambda: changes.append(1),
        clock=clock,
        unix_clock=lambda: 5e8 + clock(),
    )


async def test_a_worker_without_a_gpu_is_healthy_and_says_that_nothing_is_watched(tmp_path: Path) -> None:
    one = watch(HealthSettings(disk_free_bytes=0, memory_pressure=1), NoDevices(), tmp_path, Time())
    assert one.message().state == HealthState.HEALTH_STATE_UNSPECIFIED
    await one.look()
    assert (one.message().state, one.message().devices) == (HealthState.HEALTHY, 0)


async def test_a_file_makes_a_worker_sick_and_its_end_makes_it_well(tmp_path: Path) -> None:
    file, told_of = tmp_path / "told", list[int]()
    limits = HealthSettings(file=file, disk_free_bytes=0, memory_pressure=1)
    one = watch(limits, NoDevices(), tmp_path, Time(), told_of)
    assert (await one.look()).state == HealthState.HEALTHY
    file.write_text("# rack 7\nw-2 sick not this one\nw-1 sick its rack is to be moved\n")
    assert (await one.look()).state == SICK
    (reason,) = one.message().reasons
    assert (reason.code, reason.text, reason.state) == ("told_sick", "its rack is to be moved", SICK)
    file.unlink()
    assert (await one.look()).state == HealthState.HEALTHY
    assert len(told_of) == 3, "each change is told at once"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("* suspect slow disk", [("told_suspect", SUSPECT, "slow disk")]),
        ("w-1 sick", [("told_sick", SICK, "told to be sick")]),
        ("", []),
        ("w-1 dead", [("told_unreadable", SUSPECT, "line 1 of health.file: expected `WORKER sick|suspect WHY`")]),
    ],
)
def test_lines_of_the_file(text: str, found: list[tuple[str, int, str]]) -> None:
    assert [(one.code, one.state, one.text) for one in told.parse_told(text, "w-1")] == found


def test_memory_pressure_and_a_full_disk_are_worth_a_look() -> None:
    pressure = node.parse_pressure(PRESSURE)
    assert pressure == pytest.approx(0.265)
    found = node.findings(node.NodeReading(pressure, 5 << 20), HealthSettings())
    assert [(one.code, one.state) for one in found] == [("memory_pressure", SUSPECT), ("disk_full", SUSPECT)]
    assert list(node.findings(node.NodeReading(), HealthSettings())) == []


def test_the_node_is_read_as_far_as_it_tells(tmp_path: Path) -> None:
    reading = node.read_node(tmp_path / "not" / "there", tmp_path / "no-psi")
    assert reading.memory_pressure is None
    assert reading.disk_free_bytes is not None


async def looked(one: HealthWatch, until: HealthState.ValueType) -> None:
    async with asyncio.timeout(10):
        while one.verdict is None or one.verdict.state != until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_devices_are_read_again_and_again_and_a_driver_that_hangs_is_a_finding(tmp_path: Path) -> None:
    gpus, clock = Gpus(), Time()
    one = watch(HealthSettings(interval_s=0.1, disk_free_bytes=0, memory_pressure=1), gpus, tmp_path, clock)
    async with background(one.follow(), name="watch"):
        await looked(one, HealthState.HEALTHY)
        gpus.hang.clear()
        await asyncio.sleep(0.3)
        clock.now_s += 100.0
        await looked(one, SICK)
        assert one.message().reasons[0].code == "nvml_silent"
        gpus.hang.set()
        clock.now_s += 100.0
        # What it says when it answers at last: the time to clear has not passed.
        await asyncio.sleep(0.3)
        clock.now_s += 100.0
        await looked(one, HealthState.HEALTHY)
    assert gpus.closed


async def test_a_library_that_fails_is_a_finding_and_no_failure(tmp_path: Path) -> None:
    def broken() -> DeviceHealth:
        raise RuntimeError("libnvidia-ml.so.1\nis of another driver")

    one = watch(HealthSettings(interval_s=0.1, disk_free_bytes=0, memory_pressure=1), NoDevices(), tmp_path, Time())
    one._asking.open = broken
    async with background(one.follow(), name="watch"):
        await looked(one, SUSPECT)
    text = one.message().reasons[0].text
    assert "libnvidia-ml.so.1 is of another driver" in text
    assert text.isprintable(), "the registry refuses a record with anything else in it"


async def test_metrics_have_our_names_and_those_of_dcgm(tmp_path: Path) -> None:
    gpus = Gpus()
    gpus.now = Readings((GPU,), (XidEvent("GPU-a", 48),))
    one = watch(HealthSettings(interval_s=0.1, disk_free_bytes=0, memory_pressure=1), gpus, tmp_path, Time())
    async with background(one.follow(), name="watch"):
        await looked(one, SICK)
    registry = CollectorRegistry()
    registry.register(HealthCollector(one, lambda: ("decode", "w-1")))
    page = generate_latest(registry).decode()
    own = 'gpu="3",role="decode",uuid="GPU-a",worker="w-1"'
    dcgm = 'UUID="GPU-a",device="nvidia3",gpu="3",modelName="NVIDIA H100 80GB HBM3"'
    for line in (
        'slipstream_worker_health{role="decode",state="sick",worker="w-1"} 1.0',
        'slipstream_worker_health_reason{code="xid_48",role="decode",worker="w-1"} 1.0',
        f"slipstream_device_ecc_corrected_errors_total{{{own}}} 5.0",
        f"slipstream_device_temperature_celsius{{{own}}} 55.0",
        f"slipstream_device_nvlink_errors_total{{{own}}} 3.0",
        f"slipstream_device_nvlinks_active{{{own}}} 1.0",
        f"DCGM_FI_DEV_ECC_SBE_VOL_TOTAL{{{dcgm}}} 5.0",
        f"DCGM_FI_DEV_POWER_USAGE{{{dcgm}}} 640.5",
        f"DCGM_FI_DEV_XID_ERRORS{{{dcgm}}} 48.0",
    ):
        assert any(_same(line, found) for found in page.splitlines()), line
    assert "slipstream_device_pcie_link_lanes{" not in page, "what is not told is not shown"


def _same(wanted: str, found: str) -> bool:
    """The same sample, whatever the order of its labels."""
    return _parts(wanted) == _parts(found)


def _parts(line: str) -> tuple[str, frozenset[str], str]:
    name, _, rest = line.partition("{")
    labels, _, value = rest.rpartition("}")
    return name, frozenset(labels.split(",")), value
