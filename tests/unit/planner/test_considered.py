"""What else a decision weighed, as `slipstream planner explain` shows it."""

from __future__ import annotations

import math

from planner.considered import CHOSEN
from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives
from planner.policy import SloPolicy
from planner.scaling import Considered, Counts
from tests.unit.planner.plant import Plant, packaged

PROFILE = packaged()


def told(rate: float, counts: Counts, gpus: int = 16, bounds: Bounds | None = None) -> list[Considered]:
    """Of the last decision after ten minutes at that rate."""
    model = ModelObjectives("m", {"realtime": Objective(3.0, 0.05)}, bounds=bounds or Bounds())
    brain = SloPolicy(PlannerObjectives((model,), gpu_budget=gpus), {"m": PROFILE}, tells_considered=True)
    plant = Plant(PROFILE, lambda _: rate, counts)
    plant.run(brain, 600.0)
    decision = plant.decisions[-1]
    (chosen,) = [one for one in decision.considered if one.verdict == CHOSEN]
    assert chosen.counts == decision.targets["m"]
    return list(decision.considered)


def test_the_neighbours_are_told_with_what_is_predicted_of_them_the_cheapest_first() -> None:
    considered = told(9.0, Counts(2, 2))
    assert [one.gpus for one in considered] == sorted(one.gpus for one in considered)
    chosen = next(one for one in considered if one.verdict == CHOSEN)
    fewer = next(one for one in considered if one.counts == Counts(chosen.counts.prefill - 1, chosen.counts.decode))
    more = next(one for one in considered if one.counts == Counts(chosen.counts.prefill + 1, chosen.counts.decode))
    assert fewer.ttft_s > chosen.ttft_s > more.ttft_s
    assert more.verdict == "would do, and takes 1 GPU more"
    assert fewer.verdict != CHOSEN
    assert "first tokens" in fewer.verdict or "wait" in fewer.verdict


def test_a_queue_that_only_grows_has_no_time() -> None:
    considered = told(14.0, Counts(1, 1), gpus=2)
    (only,) = [one for one in considered if one.verdict == CHOSEN]
    assert math.isinf(only.ttft_s)
    assert {one.verdict for one in considered if one.gpus > 2} <= {"1 GPU beyond the budget"}


def test_an_aggregated_pool_is_weighed_where_it_is_allowed() -> None:
    assert not any(one.counts.prefill == 0 for one in told(3.0, Counts(1, 1)))
    bounds = Bounds(min_prefill=0, allow_aggregated=True)
    assert any(one.counts.prefill == 0 for one in told(3.0, Counts(1, 1), bounds=bounds))


def test_without_being_asked_for_it_costs_nothing() -> None:
    model = ModelObjectives("m", {"realtime": Objective(3.0, 0.05)})
    plant = Plant(PROFILE, lambda _: 3.0, Counts(1, 1))
    plant.run(SloPolicy(PlannerObjectives((model,), gpu_budget=4), {"m": PROFILE}), 30.0)
    assert all(one.considered == () for one in plant.decisions)
