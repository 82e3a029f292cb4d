"""What is wrong with a GPU, rule by rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.health.checks import DeviceChecks, silence
from engine.health.findings import SICK, SUSPECT
from engine.health.policy import HealthPolicy, Verdict
from engine.health.readings import DeviceReading, Link, Readings, XidEvent
from engine.health.xids import APPLICATION, DEVICE, HARMLESS, XidKind, kind_of, meaning_of
from slipstream.v1.registry_pb2 import HealthState
from slipstream.worker_settings import HealthSettings

HEALTHY = HealthState.HEALTHY
WELL = DeviceReading(
    0,
    "GPU-a",
    "NVIDIA H100 80GB HBM3",
    ecc_corrected=0,
    ecc_uncorrected=0,
    remap_pending=False,
    remap_failed=False,
    throttling=frozenset(),
    temperature_c=40,
    busy=0.9,
    pcie_replays=0,
    pcie_generation=5,
    pcie_generation_most=5,
    pcie_width=16,
    pcie_width_most=16,
    links=tuple(Link(number, True, 0) for number in range(4)),
)
LIMITS = HealthSettings()


class Watched:
    """One device, looked at each five seconds."""

    def __init__(self) -> None:
        self.checks = DeviceChecks(LIMITS)
        self.policy = HealthPolicy(LIMITS.clear_s)
        self.now_s = 0.0

    def look(self, *readings: DeviceReading, xids: tuple[int, ...] = (), seconds: float = 5.0) -> Verdict:
        """The verdict after it was so for that long."""
        end_s = self.now_s + seconds
        events = tuple(XidEvent("GPU-a", xid) for xid in xids)
        while self.now_s < end_s:
            self.now_s += 5.0
            verdict = self.policy.judge(self.checks.findings(Readings(readings, events), self.now_s), self.now_s)
            events = ()
        return verdict


@pytest.fixture
def watched() -> Watched:
    watched = Watched()
    assert watched.look(WELL).state == HEALTHY
    return watched


def codes(verdict: Verdict) -> list[str]:
    return [one.code for one in verdict.reasons]


@pytest.mark.parametrize(
    ("changed", "state", "code"),
    [
        (DeviceReading(0, "GPU-a", lost=True, failure="GPU is lost"), SICK, "gpu_lost"),
        (replace(WELL, ecc_uncorrected=1), SICK, "ecc_uncorrected"),
        (replace(WELL, remap_failed=True), SICK, "remap_failed"),
        (replace(WELL, retired_pages=60), SICK, "pages_retired"),
        (replace(WELL, recovery_action="reset"), SICK, "gpu_recovery"),
        (replace(WELL, links=(Link(0, False, 0), *WELL.links[1:])), SICK, "nvlink_down"),
        (replace(WELL, remap_pending=True), SUSPECT, "remap_pending"),
        (replace(WELL, retire_pending=True), SUSPECT, "remap_pending"),
        (replace(WELL, ecc_corrected=1000), SUSPECT, "ecc_corrected"),
        (replace(WELL, pcie_replays=8), SUSPECT, "pcie_replays"),
        (replace(WELL, links=(Link(0, True, 8), *WELL.links[1:])), SUSPECT, "nvlink_errors"),
        (DeviceReading(0, "GPU-a", failure="Unknown Error"), SUSPECT, "gpu_unreadable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_counts_at_once(watched: Watched, changed: DeviceReading, state: int, code: str) -> None:
    verdict = watched.look(changed)
    assert (verdict.state, codes(verdict)) == (state, [code])
    assert "GPU 0" in verdict.reasons[0].text


@pytest.mark.parametrize(
    "changed", [replace(WELL, throttling=frozenset({"power_cap"})), replace(WELL, ecc_corrected=9)]
)
def test_what_is_normal(watched: Watched, changed: DeviceReading) -> None:
    assert watched.look(changed, seconds=900).state == HEALTHY


@pytest.mark.parametrize("reason", ["hw_thermal", "sw_thermal", "hw_power_brake", "hw_slowdown"])
def test_a_gpu_that_is_slowed_down_is_suspect_and_for_long_sick(watched: Watched, reason: str) -> None:
    hot = replace(WELL, throttling=frozenset({reason}), temperature_c=92)
    assert watched.look(hot, seconds=25).state == HEALTHY
    assert watched.look(hot, seconds=10).state == SUSPECT
    assert watched.look(hot, seconds=300).state == SICK
    assert "92 °C" in watched.look(hot).reasons[0].text
    assert watched.look(WELL, seconds=LIMITS.clear_s + 5).state == HEALTHY


def test_a_narrow_pcie_link_is_a_fault_only_of_a_busy_gpu(watched: Watched) -> None:
    narrow = replace(WELL, pcie_width=8, pcie_generation=1)
    assert watched.look(replace(narrow, busy=0.0), seconds=300).state == HEALTHY
    assert codes(watched.look(narrow, seconds=65)) == ["pcie_generation", "pcie_lanes"]


def test_errors_from_before_this_worker_are_told_and_no_reason_to_fence() -> None:
    verdict = Watched().look(replace(WELL, ecc_uncorrected=2))
    assert (verdict.state, codes(verdict)) == (SUSPECT, ["ecc_uncorrected_before"])


def test_a_gpu_that_cannot_be_read_for_long_is_sick(watched: Watched) -> None:
    unread = DeviceReading(0, "GPU-a", failure="Unknown Error")
    assert watched.look(unread, seconds=LIMITS.silence_s + 10).state == SICK


def test_a_lost_gpu_stays_lost_even_if_it_answers_again(watched: Watched) -> None:
    watched.look(DeviceReading(0, "GPU-a", lost=True))
    assert watched.look(WELL, seconds=3600).state == SICK


@pytest.mark.parametrize("xid", sorted(DEVICE))
def test_an_xid_of_the_device_makes_it_sick_for_good(watched: Watched, xid: int) -> None:
    watched.look(WELL, xids=(xid,))
    assert codes(watched.look(WELL, seconds=3600)) == [f"xid_{xid}"]


@pytest.mark.parametrize("xid", [*sorted(APPLICATION), 9999])
def test_an_xid_of_a_process_or_an_unknown_one_is_suspect_for_a_while(watched: Watched, xid: int) -> None:
    assert watched.look(WELL, xids=(xid,)).state == SUSPECT
    assert watched.look(WELL, seconds=LIMITS.clear_s).state == HEALTHY


@pytest.mark.parametrize("xid", sorted(HARMLESS))
def test_a_harmless_xid_changes_nothing(watched: Watched, xid: int) -> None:
    assert watched.look(WELL, xids=(xid,)).state == HEALTHY


def test_xids_of_processes_that_repeat_are_the_device_s_after_all(watched: Watched) -> None:
    for _ in range(2):
        assert watched.look(WELL, xids=(13,), seconds=600).state != SICK
    verdict = watched.look(WELL, xids=(31,))
    assert (verdict.state, codes(verdict)[0]) == (SICK, "xids_repeated")
    assert "13, 31" in verdict.reasons[0].text
    assert watched.look(WELL, seconds=3700).state == HEALTHY


def test_every_xid_is_of_one_kind_and_has_a_meaning() -> None:
    assert len({*DEVICE, *APPLICATION, *HARMLESS}) == len(DEVICE) + len(APPLICATION) + len(HARMLESS)
    assert {kind_of(79), kind_of(13), kind_of(63), kind_of(1234)} == set(XidKind)
    assert meaning_of(79) == "the GPU has fallen off the bus"


def test_a_driver_that_does_not_answer_is_a_finding_itself() -> None:
    assert silence(None, 1000.0, LIMITS) == ()
    assert silence(0.0, 4.0, LIMITS) == ()
    assert [one.state for waited in (15.0, 61.0) for one in silence(0.0, waited, LIMITS)] == [SUSPECT, SICK]
