"""The scaling policy against a plant in closed form: what an operator would see."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives, Window
from planner.observation import Observation, Traffic, WorkerSeen
from planner.policy import SloPolicy
from planner.scaling import Counts, Drain, Flip, Start
from planner.steps import Coming
from tests.unit.planner.plant import DECODE, DRAINING, PREFILL, READY, STARTING, Plant, packaged, pool, worker

PROFILE = packaged()
SLO = Objective(ttft_s=3.0, itl_s=0.05, percentile=99.0)


def objectives(gpus: int = 16, **changes: object) -> PlannerObjectives:
    bounds = changes.pop("bounds", Bounds())
    schedule = changes.pop("schedule", ())
    model = ModelObjectives("m", {"realtime": SLO}, bounds=bounds, schedule=schedule)  # type: ignore[arg-type]
    return replace(PlannerObjectives((model,), gpu_budget=gpus), **changes)  # type: ignore[arg-type]


def policy(gpus: int = 16, **changes: object) -> SloPolicy:
    return SloPolicy(objectives(gpus, **changes), {"m": PROFILE})


def idle(at_s: float, workers: tuple[WorkerSeen, ...], **traffic: int) -> Observation:
    part = Traffic(**traffic)  # type: ignore[arg-type]
    return Observation(at_s, at_s, 5.0, workers, {("m", "realtime"): part} if traffic else {})


@pytest.mark.parametrize(("rate", "seed"), [(2.0, 1), (6.0, 2), (17.0, 4)])
def test_steady_load_with_noise_changes_nothing_for_an_hour(rate: float, seed: int) -> None:
    plant = Plant(PROFILE, lambda _: rate, Counts(2, 2), seed=seed)
    brain = policy()
    plant.run(brain, 2700.0)  # by then it knows how steady the load is
    before = plant.changes
    plant.run(brain, 3600.0)
    assert plant.changes == before, [one.reason for one in plant.decisions[540:] if one.actions]


def test_a_jump_is_answered_and_what_it_needed_is_let_go_after_it() -> None:
    plant = Plant(PROFILE, lambda at_s: 14.0 if 900.0 < at_s <= 1800.0 else 3.0, Counts(1, 1))
    brain = policy()
    plant.run(brain, 900.0)
    assert plant.now == Counts(1, 1)
    plant.run(brain, 900.0)
    assert plant.now.prefill > 1
    late = [ttft_s for at_s, ttft_s in plant.ttft if 1200.0 <= at_s < 1800.0]
    assert sum(ttft_s <= SLO.ttft_s for ttft_s in late) / len(late) > 0.98
    plant.run(brain, 900.0)
    assert plant.now == Counts(1, 1)


def test_flips_come_before_new_workers() -> None:
    plant = Plant(PROFILE, lambda at_s: 3.0 if at_s <= 50.0 else 14.0, Counts(1, 4))
    plant.run(policy(gpus=8), 300.0)
    actions = [action for one in plant.decisions for action in one.actions]
    assert isinstance(actions[0], Flip)
    assert plant.now.prefill >= 3


@pytest.mark.parametrize(("prefill", "rate"), [(3, 8.0), (3, 12.0), (5, 8.0)])
def test_the_first_requests_alone_change_nothing_while_they_are_in_time(prefill: int, rate: float) -> None:
    # What is not known yet is assumed: a planner that was just restarted has no better reason to turn things over.
    plant = Plant(PROFILE, lambda _: rate, Counts(prefill, 1))
    plant.run(policy(gpus=prefill + 1), 55.0)
    assert plant.changes == 0, [one.reason for one in plant.decisions if one.actions]


def test_nothing_is_done_before_all_have_been_heard() -> None:
    brain = policy()
    assert not brain.decide(replace(idle(0.0, ()), complete=False)).actions
    assert brain.decide(idle(5.0, ())).actions == (Start("m", PREFILL), Start("m", DECODE))


def test_a_lost_worker_is_replaced_at_once_and_only_once() -> None:
    brain = policy()
    assert not brain.decide(idle(5.0, pool(1, 1))).actions
    assert brain.decide(idle(10.0, pool(1, 0))).actions == (Start("m", DECODE),)
    assert not brain.decide(idle(15.0, pool(1, 0))).actions, "it is coming, though nobody has seen it"
    starting = (*pool(1, 0), worker("new", DECODE, state=STARTING, since_s=16.0))
    assert not brain.decide(idle(20.0, starting)).actions


def test_a_start_of_which_nothing_is_ever_seen_is_tried_again() -> None:
    brain = policy()
    starts = [at_s for at_s in range(5, 120, 5) if brain.decide(idle(float(at_s), pool(1, 0))).actions]
    assert len(starts) == 4


def test_what_was_not_done_is_not_waited_for() -> None:
    brain = policy()
    starts = []
    for at_s in range(5, 120, 5):
        decided = brain.decide(idle(float(at_s), pool(1, 0))).actions
        starts += [at_s] * len(decided)
        for action in decided:
            brain.undone(action)
    assert len(starts) > 6, "each interval in which the cooldown allows it"


def test_the_worker_with_the_least_to_lose_is_taken() -> None:
    workers = (
        *pool(1, 0),
        worker("busy", DECODE, running=9, context_tokens=9000),
        worker("old", DECODE, running=1, context_tokens=500, since_s=-5000.0),
        worker("young", DECODE, running=1, context_tokens=500, since_s=-50.0),
    )
    brain = policy()
    actions = [
        action
        for at_s in range(5, 900, 5)
        for action in brain.decide(idle(float(at_s), workers, arrivals=2, input_tokens=900)).actions
    ]
    assert actions[0] == Drain("young")


def test_a_worker_that_still_starts_is_drained_before_one_that_serves() -> None:
    workers = (*pool(1, 1), worker("starting", DECODE, state=STARTING, since_s=0.0))
    brain = policy()
    drained = [a for at_s in range(5, 300, 5) for a in brain.decide(idle(float(at_s), workers)).actions]
    assert drained[0] == Drain("starting")


def test_to_zero_only_when_asked_and_back_with_the_first_request() -> None:
    kept, emptied = policy(), policy(bounds=Bounds(to_zero=True))
    last = None
    for at_s in range(5, 1200, 5):
        assert not kept.decide(idle(float(at_s), pool(1, 1))).actions
        last = emptied.decide(idle(float(at_s), pool(1, 1)))
    assert last is not None
    assert last.targets["m"] == Counts(0, 0)
    came = emptied.decide(idle(1205.0, (), arrivals=1, input_tokens=100, queued=1, queued_tokens=100))
    assert {action.role for action in came.actions if isinstance(action, Start)} == {PREFILL, DECODE}


def test_a_window_of_the_schedule_is_ready_when_it_begins_and_over_when_it_ends() -> None:
    window = Window(start_s=600, end_s=1200, floor=Counts(3, 2))
    plant = Plant(PROFILE, lambda _: 1.0, Counts(1, 1))
    plant.run(policy(schedule=(window,)), 2400.0)
    counts = dict(plant.history)
    assert counts[400.0] == Counts(1, 1)
    ready = [one for one in plant.history if 600.0 <= one[0] < 1200.0]
    assert all(now == Counts(3, 2) for _, now in ready)
    assert plant.now == Counts(1, 1)


def test_slow_starts_are_learned_and_planned_for() -> None:
    window = Window(start_s=3000, end_s=3600, floor=Counts(5, 1))
    plant = Plant(PROFILE, lambda at_s: 1.0 if at_s < 600.0 else 8.0, Counts(1, 1), start_s=300.0)
    plant.run(policy(schedule=(window,)), 3000.0)
    serving = [one for one in plant.workers.values() if one.role == PREFILL and one.state == READY]
    assert len(serving) >= 5, "started as long before as the first ones were seen to take"


def test_before_a_start_was_seen_workers_own_word_of_theirs_is_planned_with() -> None:
    coming = Coming()
    workers = (worker("d0", DECODE, start_s=240.0), worker("d1", DECODE), worker("d2", DECODE, start_s=90.0))
    coming.seen(workers, 0.0)
    assert coming.start_s == 240.0

    coming.seen((*workers, worker("d3", DECODE, state=STARTING, since_s=10.0)), 10.0)
    coming.seen((*workers, worker("d3", DECODE, since_s=70.0, start_s=55.0)), 70.0)
    assert coming.start_s == pytest.approx(240.0 - 0.2 * (240.0 - 60.0))  # what was seen corrects it


def test_a_profile_that_is_told_again_changes_nothing() -> None:
    once, again = policy(), policy()
    first, second = (Plant(PROFILE, lambda _: 5.0, Counts(1, 1), slowness=1.5) for _ in range(2))
    first.run(once, 600.0)
    for _ in range(120):
        again.know("m", PROFILE, PROFILE)
        second.run(again, 5.0)
    assert first.decisions == second.decisions


def test_every_number_that_an_operator_would_ask_for_is_told() -> None:
    plant = Plant(PROFILE, lambda _: 5.0, Counts(1, 1))
    brain = policy()
    plant.run(brain, 300.0)
    last = plant.decisions[-1]
    for name in ("realtime.forecast_requests_per_s", "predicted_ttft_s", "predicted_itl_share", "backlog_s"):
        assert f"m.{name}" in last.numbers
    assert last.numbers["m.realtime.forecast_requests_per_s"] == pytest.approx(5.0, rel=0.3)
    assert "requests/s expected" in last.reason


def test_without_a_profile_only_the_floor_is_kept() -> None:
    brain = SloPolicy(objectives())
    first = brain.decide(idle(5.0, (), arrivals=1000, input_tokens=10**6))
    assert len(first.actions) == 2
    assert not brain.decide(idle(10.0, pool(2, 2), arrivals=1000, input_tokens=10**6)).actions
    assert "no profile" in first.reason


ROLES = st.sampled_from([PREFILL, DECODE])
WORKERS = st.builds(
    WorkerSeen,
    worker_id=st.sampled_from([f"w{number}" for number in range(12)]),
    model=st.sampled_from(["m", "m", "m", "other"]),
    role=ROLES,
    state=st.sampled_from([READY, READY, STARTING, DRAINING]),
    since_s=st.floats(-100.0, 100.0),
    running=st.integers(0, 300),
    waiting=st.integers(0, 300),
    waiting_tokens=st.integers(0, 10**7),
    context_tokens=st.integers(0, 10**7),
)
TRAFFIC = st.builds(
    Traffic,
    arrivals=st.integers(0, 500),
    refused=st.integers(0, 50),
    input_tokens=st.integers(0, 10**7),
    computed_prompt_tokens=st.integers(0, 10**7),
    cached_tokens=st.integers(0, 10**7),
    finished=st.integers(0, 500),
    output_tokens=st.integers(0, 10**6),
    queued=st.integers(0, 500),
    queued_tokens=st.integers(0, 10**7),
)
CLASSES = st.sampled_from([("m", "realtime"), ("m", "nearline"), ("m", "batch"), ("other", "realtime")])
LOOKS = st.lists(
    st.tuples(
        st.lists(WORKERS, max_size=10, unique_by=lambda one: one.worker_id),
        st.dictionaries(CLASSES, TRAFFIC, max_size=4),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(looks=LOOKS, budget=st.integers(1, 12), to_zero=st.booleans(), most=st.integers(1, 6))
def test_whatever_is_seen_the_budget_the_bounds_and_what_is_there_are_respected(
    looks: list[tuple[list[WorkerSeen], dict[tuple[str, str], Traffic], bool]], budget: int, to_zero: bool, most: int
) -> None:
    bounds = Bounds(max_prefill=most, max_decode=most, to_zero=to_zero)
    first, again = policy(budget, bounds=bounds), policy(budget, bounds=bounds)
    for number, (workers, traffic, complete) in enumerate(looks):
        at_s = 5.0 * (number + 1)
        seen = Observation(at_s, at_s, 5.0, tuple(workers), traffic, complete)
        decision = first.decide(seen)
        assert decision == again.decide(seen), "the same observations, the same decision"
        there = {one.worker_id: one for one in workers}
        started = [action for action in decision.actions if isinstance(action, Start)]
        touched = [action.worker_id for action in decision.actions if not isinstance(action, Start)]
        assert len(decision.actions) <= 4
        assert not started or sum(one.gpus for one in workers) + len(started) <= budget
        assert len(set(touched)) == len(touched)
        assert all(there[worker_id].model == "m" and there[worker_id].state != DRAINING for worker_id in touched)
        for action in decision.actions:
            if isinstance(action, Flip):
                assert there[action.worker_id].state == READY
                assert there[action.worker_id].role != action.role
        if not complete:
            assert not decision.actions
        for role in (PREFILL, DECODE):
            same = [one for one in workers if one.model == "m" and one.role == role and one.state != DRAINING]
            more = sum(1 for one in started if one.role == role)
            more += sum(1 for one in decision.actions if isinstance(one, Flip) and one.role == role)
            assert not more or len(same) + more <= most
