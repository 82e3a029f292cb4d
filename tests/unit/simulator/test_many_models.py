"""Three models on one budget, end to end in virtual time: planner, admission, router, workers.

Conversations follow a day, a small model needs one worker that does both, and batch work of a third has what is left:
it moves in while few talk, and is gone when many do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives
from planner.observation import Observation
from planner.policy import SloPolicy
from planner.scaling import Counts, Decision
from simulator import loads
from simulator.outcome import Figures, Outcome
from simulator.run import ModelSetup, Setup, profile_named, simulate
from simulator.traces import Arrival

PROFILE = profile_named("qwen3-32b-h200-tp1")
BUDGET, START_S, DAY_S = 7, 20.0, 900.0
CHAT = {"realtime": Objective(4.0, 0.05), "nearline": Objective(30.0, 0.1, 95.0)}
SMALL = {"realtime": Objective(2.0, 0.05, 95.0)}
POLICY = PlannerObjectives(
    (
        ModelObjectives("chat", CHAT, weight=2.0),
        ModelObjectives("small", SMALL, bounds=Bounds(min_prefill=0, allow_aggregated=True), weight=2.0),
        ModelObjectives("jobs", {"batch": Objective(3600.0, 10.0, 50.0)}),
    ),
    gpu_budget=BUDGET,
    start_s=START_S,
    horizon_s=60.0,
    down_cooldown_s=60.0,
)


def load() -> Iterator[Arrival]:
    def of(model: str, rate: loads.Rate, tokens: int, service_class: str = "realtime") -> loads.Synthetic:
        inputs, outputs = loads.Lognormal(tokens, 0.5, 64, 30_000), loads.Lognormal(200, 0.5, 8, 1_500)
        name = f"{model}-{service_class}"
        return loads.Synthetic(
            rate, inputs, outputs, duration_s=DAY_S, seed=1, model=model, service_class=service_class, name=name
        )

    return loads.merged(
        of("chat", loads.DailyCycle(3.5, 8.0, DAY_S), 9000),
        of("chat", loads.Constant(0.1), 9000, "nearline"),
        of("small", loads.Constant(1.0), 500),
        of("jobs", loads.Constant(5.0), 9000, "batch"),
    )


class Watched:
    """The policy, and what it was shown and decided."""

    def __init__(self) -> None:
        self.inner = SloPolicy(POLICY, dict.fromkeys(("chat", "small", "jobs"), PROFILE))
        self.seen: list[tuple[Observation, Decision]] = []

    def decide(self, seen: Observation) -> Decision:
        decision = self.inner.decide(seen)
        self.seen.append((seen, decision))
        return decision

    def most(self, model: str, from_s: float, to_s: float) -> int:
        """Workers wanted for a model within that time."""
        return max(one.targets[model].total for seen, one in self.seen if from_s <= seen.at_s < to_s)


@pytest.fixture(scope="module")
def run() -> tuple[Outcome, Watched]:
    policy = Watched()
    setup = Setup(
        (
            ModelSetup("chat", PROFILE, Counts(1, 1), CHAT),
            ModelSetup("small", PROFILE, Counts(0, 1), SMALL),
            ModelSetup("jobs", PROFILE, Counts(1, 1)),
        ),
        load(),
        policy,
        gpu_budget=BUDGET,
        start_s=START_S,
    )
    return simulate(setup), policy


def figures(outcome: Outcome, model: str, service_class: str) -> Figures:
    return next(one for one in outcome.classes if (one.model, one.service_class) == (model, service_class))


def test_who_has_an_objective_keeps_it_whatever_batch_work_waits(run: tuple[Outcome, Watched]) -> None:
    outcome, _ = run
    assert figures(outcome, "chat", "realtime").attainment >= 0.99
    assert figures(outcome, "chat", "nearline").attainment >= 0.95
    assert figures(outcome, "small", "realtime").attainment >= 0.95
    assert figures(outcome, "jobs", "batch").finished > 1000


def test_the_budget_is_kept_at_every_moment(run: tuple[Outcome, Watched]) -> None:
    outcome, policy = run
    assert outcome.peak_gpus == BUDGET, "batch work takes all that is left"
    assert all(sum(one.gpus for one in seen.workers) <= BUDGET for seen, _ in policy.seen)
    assert outcome.refused_actions == 0


def test_batch_work_moves_in_at_low_traffic_and_out_before_the_peak_and_does_not_come_and_go(
    run: tuple[Outcome, Watched],
) -> None:
    outcome, policy = run
    early, peak = policy.most("jobs", 60.0, 150.0), policy.most("jobs", DAY_S / 2 - 60.0, DAY_S / 2 + 60.0)
    assert peak < early
    assert peak < policy.most("jobs", DAY_S - 100.0, DAY_S)
    assert policy.most("chat", DAY_S / 2 - 60.0, DAY_S / 2 + 60.0) > policy.most("chat", 60.0, 150.0)
    assert outcome.actions <= 20


def test_the_small_model_does_with_one_worker_for_both(run: tuple[Outcome, Watched]) -> None:
    _, policy = run
    assert {decision.targets["small"] for _, decision in policy.seen} == {Counts(0, 1)}
