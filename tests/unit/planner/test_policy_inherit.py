"""Another policy is put in force: what was learned before stays where it still holds."""

from __future__ import annotations

from dataclasses import replace

from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.policy import SloPolicy
from planner.scaling import Counts
from simulator import loads
from simulator.run import ModelSetup, Setup, profile_named, simulate

PROFILE = profile_named("qwen3-32b-h200-tp1")
LIMITS = Objective(2.0, 0.05)
BEFORE = PlannerObjectives((ModelObjectives("m", {"realtime": LIMITS}),), gpu_budget=6, start_s=30.0)


def learned() -> SloPolicy:
    """One that has seen ten minutes of a load."""
    policy = SloPolicy(BEFORE, {"m": PROFILE})
    load = loads.Synthetic(loads.Constant(3.0), loads.Fixed(2000), loads.Fixed(100), duration_s=600.0, seed=1)
    simulate(Setup((ModelSetup("m", PROFILE, Counts(1, 1), {"realtime": LIMITS}),), load, policy, gpu_budget=6))
    return policy


def test_forecast_speeds_and_what_is_under_way_stay_and_what_hangs_on_the_limits_only_under_the_same_ones() -> None:
    before = learned()
    past = before._past["m"]
    assert past.caution.level < 0.0
    same = SloPolicy(replace(BEFORE, gpu_budget=3, horizon_s=300.0), {"m": PROFILE})
    same.inherit(before)
    kept = same._past["m"]
    assert kept.classes["realtime"].requests.age_s >= 595.0
    assert kept.classes["realtime"].requests.forecast(60.0).mean > 2.0
    assert kept.learner is past.learner
    assert kept.coming is past.coming
    assert (kept.caution, kept.bars) == (past.caution, past.bars)

    tighter = ModelObjectives("m", {"realtime": Objective(0.5, 0.05)})
    other = SloPolicy(replace(BEFORE, models=(tighter, replace(tighter, model="new"))), {"m": PROFILE})
    other.inherit(before)
    assert other._past["m"].classes is past.classes
    assert other._past["m"].caution is not past.caution
    assert other._past["new"].classes == {}


def test_other_workers_speeds_are_learned_anew() -> None:
    before = learned()
    after = SloPolicy(BEFORE, {"m": profile_named("qwen3-32b-h200-tp2")})
    after.inherit(before)
    assert after._past["m"].learner is not before._past["m"].learner
