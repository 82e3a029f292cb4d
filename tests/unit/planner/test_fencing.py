"""Who is fenced, who is freed, and what is left as it is because the budget says so."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.fencing import HOUR_S, UNSEEN_S, Fencing, because
from slipstream.v1.registry_pb2 import Health, HealthReason, HealthState, Role, WorkerRecord, WorkerState
from slipstream.worker_settings import HealthSettings

READY, FENCED, STARTING = WorkerState.READY, WorkerState.FENCED, WorkerState.STARTING
HEALTHY, SICK = HealthState.HEALTHY, HealthState.SICK
UNIX_S = 1.7e9


def a_worker(
    name: str,
    health: HealthState.ValueType = HEALTHY,
    state: WorkerState.ValueType = READY,
    *,
    role: Role.ValueType = Role.ROLE_DECODE,
    since_unix_s: int = 0,
    fenced_unix_s: int = 0,
) -> WorkerRecord:
    reasons = [HealthReason(code="xid_79", state=SICK, text=f"{name} fell off the bus")] if health == SICK else []
    return WorkerRecord(
        worker_id=name,
        role=role,
        state=state,
        model="m",
        epoch=1,
        health=Health(state=health, reasons=reasons, since_unix_s=since_unix_s, fenced_unix_s=fenced_unix_s),
    )


def pool(healthy: int, *others: WorkerRecord) -> list[WorkerRecord]:
    return [*(a_worker(f"well-{number}") for number in range(healthy)), *others]


def decided(fencing: Fencing, records: list[WorkerRecord], now_s: float = 0.0) -> tuple[list[str], list[str], object]:
    orders = fencing.decide(records, {}, now_s, UNIX_S + now_s)
    for record, _ in orders.fence:
        fencing.fenced(record, now_s)
    return [one.worker_id for one, _ in orders.fence], [one.worker_id for one in orders.free], orders.held


def test_a_sick_worker_with_a_healthy_peer_is_fenced_and_it_is_said_why() -> None:
    orders = Fencing(HealthSettings()).decide(pool(1, a_worker("ill", SICK)), {}, 0.0, UNIX_S)
    assert [(one.worker_id, why) for one, why in orders.fence] == [("ill", "ill fell off the bus")]


def test_a_slow_worker_is_as_sick_as_one_whose_device_is() -> None:
    records = pool(2, a_worker("slow"))
    orders = Fencing(HealthSettings()).decide(records, {"slow": "it takes 2 times as long"}, 0.0, UNIX_S)
    assert [(one.worker_id, why) for one, why in orders.fence] == [("slow", "it takes 2 times as long")]


@pytest.mark.parametrize("others", [0, 2], ids=["alone", "all are"])
def test_the_last_healthy_worker_of_a_pool_is_not_taken_away(others: int) -> None:
    sick = [a_worker(f"ill-{number}", SICK) for number in range(others + 1)]
    elsewhere = a_worker("prefill", role=Role.ROLE_PREFILL)
    fence, _, held = decided(Fencing(HealthSettings()), [*sick, elsewhere])
    assert fence == []
    assert held == {one.worker_id: "last" for one in sick}


def test_of_several_the_longest_sick_goes_first_and_the_share_holds_the_others() -> None:
    sick = [a_worker(f"ill-{number}", SICK, since_unix_s=100 - number) for number in range(3)]
    fence, _, held = decided(Fencing(HealthSettings(most_fenced_share=0.25)), pool(5, *sick))
    assert fence == ["ill-2", "ill-1"]
    assert held == {"ill-0": "share"}


def test_within_an_hour_only_so_many_and_then_again() -> None:
    fencing = Fencing(HealthSettings(replacements_per_hour=2, most_fenced_share=1.0))
    records = pool(9, *(a_worker(f"ill-{number}", SICK) for number in range(3)))
    assert decided(fencing, records)[0] == ["ill-0", "ill-1"]
    for record in records:  # the fenced ones are gone, replaced
        if record.worker_id in ("ill-0", "ill-1"):
            record.health.CopyFrom(Health(state=HEALTHY))
            record.epoch = 2
    fence, _, held = decided(fencing, records, 600.0)
    assert (fence, held, fencing.left(600.0)) == ([], {"ill-2": "budget"}, 0)
    assert decided(fencing, records, HOUR_S)[0] == ["ill-2"]


def test_a_budget_of_none_and_a_switch_keep_all_in_service() -> None:
    records = pool(3, a_worker("ill", SICK))
    assert decided(Fencing(HealthSettings(replacements_per_hour=0)), records) == ([], [], {"ill": "budget"})
    assert decided(Fencing(HealthSettings(fence=False)), records) == ([], [], {"ill": "off"})


def test_an_order_counts_at_once_and_once() -> None:
    """The record says so a moment later; until then nobody is fenced twice, nor another one beyond the share."""
    fencing = Fencing(HealthSettings())
    records = pool(3, a_worker("ill", SICK), a_worker("too", SICK))
    assert decided(fencing, records)[0] == ["ill"]
    assert decided(fencing, records, 1.0) == ([], [], {"too": "share"})
    assert fencing.left(1.0) == 3
    # It did not take: asked again.
    assert decided(fencing, records, UNSEEN_S + 1.0)[0] == ["ill"]
    assert fencing.left(UNSEEN_S + 1.0) == 3


def test_a_fenced_worker_that_is_well_again_is_freed() -> None:
    assert decided(Fencing(HealthSettings()), pool(1, a_worker("was", HEALTHY, FENCED)))[1] == ["was"]
    assert decided(Fencing(HealthSettings()), pool(1, a_worker("is", SICK, FENCED)))[1] == []


def test_a_control_plane_that_was_restarted_counts_what_is_still_fenced() -> None:
    fencing = Fencing(HealthSettings(replacements_per_hour=2, most_fenced_share=1.0))
    before = [a_worker("a", SICK, FENCED, fenced_unix_s=int(UNIX_S) - 60)]
    before.append(a_worker("b", SICK, FENCED, fenced_unix_s=int(UNIX_S) - 7200))
    fence, _, held = decided(fencing, pool(5, *before, a_worker("c", SICK), a_worker("d", SICK)))
    assert (fence, held) == (["c"], {"d": "budget"})


def test_a_wall_clock_that_goes_back_does_not_spend_the_budget_again_for_who_is_still_fenced() -> None:
    fencing = Fencing(HealthSettings(replacements_per_hour=1))
    records = pool(3, a_worker("ill", SICK))
    assert decided(fencing, records)[0] == ["ill"]
    records[-1] = a_worker("ill", SICK, FENCED, fenced_unix_s=int(UNIX_S))
    for now_s in (1.0, HOUR_S + 1.0):
        fencing.decide(records, {}, now_s, UNIX_S + now_s)
    fencing.decide(records, {}, HOUR_S + 2.0, UNIX_S)  # an hour back
    assert fencing.left(HOUR_S + 2.0) == 1


def test_the_reason_fits_a_record() -> None:
    record = a_worker("w", SICK)
    record.health.reasons[0].text = "x" * 240
    assert len(because(record, {})) == 200


WORKERS = st.lists(
    st.builds(
        a_worker,
        st.integers(0, 99).map(str),
        st.sampled_from([HEALTHY, SICK, SICK, HealthState.SUSPECT]),
        st.sampled_from([READY, READY, READY, FENCED, STARTING]),
        role=st.sampled_from([Role.ROLE_DECODE, Role.ROLE_PREFILL]),
    ),
    max_size=12,
    unique_by=lambda one: one.worker_id,
)


@given(st.lists(WORKERS, max_size=8), st.integers(0, 5), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_whatever_happens_the_budget_holds(looks: list[list[WorkerRecord]], per_hour: int, share: float) -> None:
    limits = HealthSettings(replacements_per_hour=per_hour, most_fenced_share=share)
    fencing, fenced_at = Fencing(limits), dict[str, float]()
    for place, records in enumerate(looks):
        now_s = place * 400.0
        orders = fencing.decide(records, {}, now_s, UNIX_S + now_s)
        taken = {one.worker_id for one, _ in orders.fence}
        for record, _ in orders.fence:
            assert (record.state, record.health.state) == (READY, SICK)
            fencing.fenced(record, now_s)
            fenced_at[record.worker_id] = now_s
        assert sum(now_s - at_s < HOUR_S for at_s in fenced_at.values()) <= per_hour
        pools = {(one.model, one.role) for one in records}
        for model, role in pools:
            own = [one for one in records if (one.model, one.role) == (model, role)]
            if any(one.worker_id in taken for one in own):
                left = [one for one in own if one.state == READY and one.worker_id not in taken]
                assert any(one.health.state != SICK for one in left), "a healthy one is there for those that go"
                states = Counter(one.state for one in own)
                most = max(1, math.floor(share * (states[READY] + states[FENCED])))
                assert states[FENCED] + sum(one.worker_id in taken for one in own) <= most
        # Nobody is forgotten: each sick worker in service is fenced now, or it is said what holds it.
        sick = {one.worker_id for one in records if one.state == READY and one.health.state == SICK}
        assert sick - taken - set(orders.held) <= {
            record.worker_id for record in records if fencing._is_fenced(record, now_s)
        }
