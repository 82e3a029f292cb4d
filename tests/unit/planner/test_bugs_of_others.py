"""What went wrong in another planner (Dynamo's), as behaviour that ours must not show."""

from __future__ import annotations

import math

from planner.capacity import Pair, PrefillQueue
from planner.corrections import Learner
from planner.demand import Demand
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.observation import Observation, Traffic
from planner.policy import SloPolicy
from planner.scaling import Counts, Start
from tests.unit.planner.plant import DECODE, PREFILL, Plant, packaged, pool, worker

PROFILE = packaged()
MODEL = ModelObjectives("m", {"realtime": Objective(ttft_s=3.0, itl_s=0.05)})


def policy(gpus: int = 16, objective: Objective | None = None) -> SloPolicy:
    model = MODEL if objective is None else ModelObjectives("m", {"realtime": objective})
    return SloPolicy(PlannerObjectives((model,), gpu_budget=gpus), {"m": PROFILE})


def test_requests_that_wait_in_the_frontends_are_seen() -> None:
    """10528: its model knew rates and compute times, and not the queue: TTFT rose to minutes while it saw no need.

    Here little arrives, so that the rate says that all is well: only what waits says that it is not.
    """
    calm, queued = policy(), policy()
    waits = {"arrivals": 5, "input_tokens": 10_000, "finished": 5, "output_tokens": 1000}
    starts: dict[str, int] = {"calm": 0, "queued": 0}
    for number in range(30):
        at_s = 5.0 * (number + 1)
        for name, one, more in (("calm", calm, {}), ("queued", queued, {"queued": 200, "queued_tokens": 400_000})):
            traffic = {("m", "realtime"): Traffic(**waits, **more)}  # type: ignore[arg-type]
            decision = one.decide(Observation(at_s, at_s, 5.0, pool(1, 1), traffic))
            starts[name] += sum(isinstance(action, Start) and action.role == PREFILL for action in decision.actions)
    assert starts["calm"] == 0
    assert starts["queued"] > 0


def test_tokens_that_wait_in_the_workers_are_seen() -> None:
    """10528, the other half: the queue may stand in the engines."""
    brain, started = policy(), 0
    workers = (worker("p0", PREFILL, waiting=100, waiting_tokens=400_000), worker("d0", DECODE))
    for number in range(30):
        at_s = 5.0 * (number + 1)
        traffic = {("m", "realtime"): Traffic(arrivals=5, input_tokens=10_000)}
        actions = brain.decide(Observation(at_s, at_s, 5.0, workers, traffic)).actions
        started += sum(isinstance(action, Start) and action.role == PREFILL for action in actions)
    assert started > 0


def test_a_rate_that_swings_within_minutes_is_followed() -> None:
    """10528's load: a sinusoid of 900 s. Almost all first tokens come in time once the pool has grown."""

    def swinging(at_s: float) -> float:
        return 7.0 - 6.0 * math.cos(2.0 * math.pi * at_s / 900.0)

    plant = Plant(PROFILE, swinging, Counts(2, 2))
    plant.run(policy(), 2250.0)
    late = [ttft_s for at_s, ttft_s in plant.ttft if at_s > 900.0]
    assert sum(ttft_s <= 3.0 for ttft_s in late) / len(late) > 0.9
    assert sum(late) / len(late) < 5.0


def test_no_worker_goes_that_the_others_cannot_do_without() -> None:
    """PR 9294: at a load that two just bear, one was taken away for being idle half of the time, and came back.

    Before a step down the survivors are checked at load x N/(N-1): here no count is left for which it fails.
    """
    brain = policy()
    pair = Pair.of(PROFILE)
    assert 1.0 < PrefillQueue(Demand(7.4, 2000.0, 200.0), pair.prefill).offered < 1.05, "both are idle half of the time"
    plant = Plant(PROFILE, lambda _: 7.4, Counts(2, 1))
    plant.run(brain, 1800.0)
    assert {counts.prefill for _, counts in plant.history} == {2}


def test_a_goal_that_no_count_reaches_neither_takes_all_nor_keeps_all() -> None:
    """PR 11624: where one prompt alone takes longer than the TTFT limit, a floor computed from their quotient grew
    without an effect, and kept workers that nothing needed.
    """
    plant = Plant(PROFILE, lambda _: 2.0, Counts(6, 6), input_tokens=8000.0)
    plant.run(policy(objective=Objective(ttft_s=0.05, itl_s=0.05)), 1200.0)
    assert plant.now.prefill <= 3
    assert plant.now.decode <= 2


def test_a_floor_holds_no_other_role() -> None:
    """PR 11624, the other half: prefill at its floor does not keep decode from going down."""
    plant = Plant(PROFILE, lambda _: 0.5, Counts(1, 6))
    plant.run(policy(), 1800.0)
    assert plant.now == Counts(1, 1)


def test_what_cold_workers_do_teaches_nothing() -> None:
    """12430: the first samples after a start, ten times too slow, made every later plan ten times too large."""
    plant = Plant(PROFILE, lambda _: 1.0, Counts(1, 1), cold_slowness=10.0)
    plant.workers = {"p": worker("p", PREFILL, since_s=4.0), "d": worker("d", DECODE, since_s=4.0)}
    brain = policy()
    plant.run(brain, 40.0)
    assert max(ttft_s for _, ttft_s in plant.ttft) > 1.5, "they were cold"
    for decision in plant.decisions:
        assert decision.numbers["m.prefill_correction"] == 1.0
        assert decision.numbers["m.decode_correction"] == 1.0


def test_what_settled_workers_do_teaches_within_bounds() -> None:
    learner = Learner(Pair.of(PROFILE))
    workers = (worker("p", PREFILL), worker("d", DECODE, running=8, context_tokens=8 * 2100))
    slow_s = 50.0 * learner.pair.decode.decode_s(8, 2100)
    for number in range(400):
        traffic = Traffic(arrivals=5, finished=5)
        traffic.itl.add(slow_s, 5)
        learner.learn(workers, traffic, Demand(1.0, 2000.0, 200.0), 5.0 * number, 5.0)
    assert 2.0 < learner.corrections.decode <= 3.0
    for number in range(400, 6000):
        learner.learn((), Traffic(), Demand(0.0, 2000.0, 200.0), 5.0 * number, 5.0)
    assert learner.corrections.decode < 1.1, "forgotten when nothing comes"
