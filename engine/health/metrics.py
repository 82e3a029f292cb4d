"""A worker's device and node as metric families: under our names, and under those of NVIDIA's DCGM exporter where they
mean the same, so that dashboards and alerts made for that one work here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.health.checks import SLOWDOWNS
from engine.health.readings import DeviceReading
from engine.health.watch import HealthWatch
from slipstream.v1.registry_pb2 import HealthState


@dataclass(frozen=True, slots=True)
class _Figure:
    """One figure of a device. `counter`: it only grows; `dcgm`: its name there, if it has one."""

    name: str
    text: str
    value: Callable[[DeviceReading], float | None]
    counter: bool = False
    dcgm: str = ""


_FIGURES = (
    _Figure("slipstream_device_lost", "1 for a GPU that does not answer any more.", lambda one: float(one.lost)),
    _Figure(
        "slipstream_device_ecc_corrected_errors",
        "Corrected memory errors since its driver was loaded.",
        lambda one: one.ecc_corrected,
        counter=True,
        dcgm="DCGM_FI_DEV_ECC_SBE_VOL_TOTAL",
    ),
    _Figure(
        "slipstream_device_ecc_uncorrected_errors",
        "Uncorrectable memory errors since its driver was loaded. Any growth: the worker is fenced.",
        lambda one: one.ecc_uncorrected,
        counter=True,
        dcgm="DCGM_FI_DEV_ECC_DBE_VOL_TOTAL",
    ),
    _Figure(
        "slipstream_device_remapped_rows_corrected",
        "Rows of memory replaced for corrected errors, ever.",
        lambda one: one.rows_remapped_corrected,
        dcgm="DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS",
    ),
    _Figure(
        "slipstream_device_remapped_rows_uncorrected",
        "Rows of memory replaced for uncorrectable errors, ever.",
        lambda one: one.rows_remapped_uncorrected,
        dcgm="DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS",
    ),
    _Figure(
        "slipstream_device_row_remap_pending",
        "1 while a bad row waits for a reset to be replaced.",
        lambda one: None if one.remap_pending is None else float(one.remap_pending),
    ),
    _Figure(
        "slipstream_device_row_remap_failed",
        "1 when a bad row cannot be replaced any more: the GPU is to be exchanged.",
        lambda one: None if one.remap_failed is None else float(one.remap_failed),
        dcgm="DCGM_FI_DEV_ROW_REMAP_FAILURE",
    ),
    _Figure(
        "slipstream_device_temperature_celsius",
        "Of the GPU. From slipstream_device_slowdown_temperature_celsius on it slows itself down.",
        lambda one: one.temperature_c,
        dcgm="DCGM_FI_DEV_GPU_TEMP",
    ),
    _Figure(
        "slipstream_device_slowdown_temperature_celsius",
        "The temperature from which the GPU slows itself down.",
        lambda one: one.slowdown_c,
    ),
    _Figure(
        "slipstream_device_power_watts",
        "Drawn now.",
        lambda one: one.power_w,
        dcgm="DCGM_FI_DEV_POWER_USAGE",
    ),
    _Figure("slipstream_device_power_limit_watts", "The most that it may draw.", lambda one: one.power_limit_w),
    _Figure(
        "slipstream_device_busy_ratio",
        "The part of the last moment in which something was computed, 0 to 1.",
        lambda one: one.busy,
    ),
    _Figure(
        "slipstream_device_pcie_replays",
        "PCIe packets sent again. A steady rate: a bad slot, riser or cable.",
        lambda one: one.pcie_replays,
        counter=True,
        dcgm="DCGM_FI_DEV_PCIE_REPLAY_COUNTER",
    ),
    _Figure("slipstream_device_pcie_link_generation", "Now; lower while it is idle.", lambda one: one.pcie_generation),
    _Figure("slipstream_device_pcie_link_lanes", "Now.", lambda one: one.pcie_width),
    _Figure(
        "slipstream_device_nvlink_errors",
        "Replays, recoveries and bad packets of all its NVLinks.",
        lambda one: sum(link.errors for link in one.links) if one.links else None,
        counter=True,
    ),
    _Figure(
        "slipstream_device_nvlinks_active",
        "NVLinks that are up.",
        lambda one: sum(link.active for link in one.links) if one.links else None,
    ),
)


class HealthCollector(Collector):
    """Read from the thread that serves /metrics: all that it takes is replaced as a whole.

    Args:
        values: of the labels `role` and `worker`.
    """

    def __init__(self, watch: HealthWatch, values: Callable[[], tuple[str, str]]) -> None:
        self._watch = watch
        self._values = values

    def collect(self) -> Iterable[Metric]:
        yield from self._state()
        devices = [one for one in tuple(self._watch.readings) if one.uuid]
        if not devices:
            return
        for figure in _FIGURES:
            yield from self._figure(figure, devices)
        yield from self._throttling(devices)
        yield from self._xids(devices)

    def _state(self) -> Iterator[Metric]:
        verdict = self._watch.verdict
        state = GaugeMetricFamily(
            "slipstream_worker_health",
            "1 for the state that the worker is in: healthy, suspect or sick. Sick for long: nobody could replace it.",
            labels=("role", "worker", "state"),
        )
        for one in (HealthState.HEALTHY, HealthState.SUSPECT, HealthState.SICK):
            now = verdict is not None and verdict.state == one
            state.add_metric((*self._values(), HealthState.Name(one).lower()), float(now))
        yield state
        reasons = GaugeMetricFamily(
            "slipstream_worker_health_reason",
            "1 for each thing that is wrong with the worker, by code; docs/health.md tells what they are.",
            labels=("role", "worker", "code"),
        )
        for code in sorted({one.code for one in verdict.reasons} if verdict is not None else ()):
            reasons.add_metric((*self._values(), code), 1.0)
        yield reasons
        pressure = self._watch.node.memory_pressure
        if pressure is not None:
            yield GaugeMetricFamily(
                "slipstream_node_memory_pressure_ratio",
                "The part of the last minute in which all work on this node waited for memory.",
                value=pressure,
            )

    def _figure(self, figure: _Figure, devices: list[DeviceReading]) -> Iterator[Metric]:
        kind = CounterMetricFamily if figure.counter else GaugeMetricFamily
        family = kind(figure.name, figure.text, labels=("role", "worker", "gpu", "uuid"))
        theirs = Metric(figure.dcgm, f"The same as {figure.name}: {figure.text}", "gauge") if figure.dcgm else None
        for one in devices:
            value = figure.value(one)
            if value is None:
                continue
            family.add_metric((*self._values(), str(one.index), one.uuid), float(value))
            if theirs is not None:
                theirs.add_sample(figure.dcgm, _dcgm_labels(one), float(value))
        yield family
        if theirs is not None:
            yield theirs

    def _throttling(self, devices: list[DeviceReading]) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "slipstream_device_throttled",
            "1 while the GPU's clocks are lowered for that reason; `power_cap` is normal at full load.",
            labels=("role", "worker", "gpu", "uuid", "reason"),
        )
        for one in devices:
            for reason in (*SLOWDOWNS, "power_cap") if one.throttling is not None else ():
                values = (*self._values(), str(one.index), one.uuid, reason)
                family.add_metric(values, float(reason in (one.throttling or ())))
        yield family

    def _xids(self, devices: list[DeviceReading]) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "slipstream_device_xids",
            "Errors that the driver reported, by number; docs/health.md tells which of them are the device's.",
            labels=("role", "worker", "gpu", "uuid", "xid"),
        )
        index = {one.uuid: str(one.index) for one in devices}
        for (uuid, xid), count in sorted(dict(self._watch.xids).items()):
            family.add_metric((*self._values(), index.get(uuid, ""), uuid, str(xid)), count)
        yield family
        latest = Metric("DCGM_FI_DEV_XID_ERRORS", "The number of the last Xid; 0: none was seen.", "gauge")
        for one in devices:
            latest.add_sample(
                "DCGM_FI_DEV_XID_ERRORS", _dcgm_labels(one), float(self._watch.latest_xid.get(one.uuid, 0))
            )
        yield latest


def _dcgm_labels(one: DeviceReading) -> dict[str, str]:
    return {"gpu": str(one.index), "UUID": one.uuid, "device": f"nvidia{one.index}", "modelName": one.name}
