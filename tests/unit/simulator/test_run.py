"""Whole runs: workers that come, change, die and go under a policy, several models and classes, the same each time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from planner.objectives import Objective
from planner.observation import Observation
from planner.scaling import Action, Counts, Decision, Drain, Flip, Start
from simulator.loads import Constant, Fixed, Lognormal, Steps, Synthetic, merged
from simulator.outcome import Outcome, to_json
from simulator.run import Failure, ModelSetup, Setup, simulate
from simulator.traces import Arrival
from slipstream.settings import AdmissionSettings
from slipstream.v1.registry_pb2 import Role, WorkerState
from tests.unit.simulator.test_serving import PROFILE

LIMITS = {"realtime": Objective(2.0, 0.1), "nearline": Objective(10.0, 0.2)}
TWO = (ModelSetup("m", PROFILE, Counts(1, 1), LIMITS),)


@dataclass
class Scripted:
    """Does what is written, at its time, and remembers what it saw."""

    script: dict[float, tuple[Action, ...]]
    seen: list[Observation] = field(default_factory=list)

    def decide(self, seen: Observation) -> Decision:
        self.seen.append(seen)
        return Decision(seen.at_s, {}, self.script.get(seen.at_s, ()), "as written")


def steady(
    per_s: float = 4.0, duration_s: float = 60.0, *, model: str = "", service_class: str = "realtime"
) -> Synthetic:
    name = f"{model}{service_class}"
    lengths = Lognormal(300, most=1500), Lognormal(20, most=60)
    return Synthetic(Constant(per_s), *lengths, duration_s, model=model, service_class=service_class, name=name)


def ran(
    load: Iterable[Arrival], script: dict[float, tuple[Action, ...]] | None = None, **more: object
) -> tuple[Outcome, Scripted]:
    policy = Scripted(script or {})
    setup = Setup(TWO, load, policy, start_s=10.0, keep_journeys=True, series_s=5.0)
    return simulate(replace(setup, **more)), policy  # type: ignore[arg-type]


def roles_at(policy: Scripted, at_s: float) -> dict[str, tuple[str, str]]:
    seen = next(one for one in policy.seen if one.at_s == at_s)
    return {one.worker_id: (Role.Name(one.role), WorkerState.Name(one.state)) for one in seen.workers}


def test_every_request_of_a_steady_load_is_answered() -> None:
    outcome, policy = ran(steady())
    assert outcome.all.requests == outcome.all.finished == len(outcome.journeys) > 200
    assert outcome.all.failed == outcome.all.refused == 0
    assert sum(one.arrivals for one in outcome.series) == outcome.all.requests
    assert sum(one.finished for one in outcome.series) == outcome.all.finished
    assert outcome.gpu_hours == pytest.approx(2 * outcome.duration_s / 3600)
    assert [one.at_s for one in policy.seen[:3]] == [5.0, 10.0, 15.0]


def test_a_started_worker_costs_its_gpus_at_once_and_takes_requests_when_it_is_ready() -> None:
    outcome, policy = ran(steady(), {10.0: (Start("m", Role.ROLE_DECODE),)})
    assert roles_at(policy, 15.0)["decode-1"] == ("ROLE_DECODE", "STARTING")
    assert roles_at(policy, 20.0)["decode-1"] == ("ROLE_DECODE", "READY")
    first = min(one.arrival.at_s for one in outcome.journeys if one.decode == "decode-1")
    assert first >= 20.0
    assert outcome.gpu_hours == pytest.approx((2 * outcome.duration_s + outcome.duration_s - 10.0) / 3600)
    assert outcome.all.failed == 0


def test_a_start_beyond_the_budget_is_refused_and_said() -> None:
    outcome, _ = ran(steady(duration_s=20), {10.0: (Start("m", Role.ROLE_DECODE),)}, gpu_budget=2)
    assert (outcome.actions, outcome.refused_actions) == (1, 1)
    assert outcome.decisions[0].actions[0].refused == "2 of 2 GPUs are occupied, 1 more are needed"
    assert len(outcome.workers) == 2


def test_a_drained_worker_finishes_what_it_has_and_ends() -> None:
    models = (replace(TWO[0], counts=Counts(1, 2)),)
    outcome, _ = ran(steady(8.0), {20.0: (Drain("decode-1"),)}, models=models)
    drained = next(one for one in outcome.workers if one.worker_id == "decode-1")
    its = [one for one in outcome.journeys if one.decode == "decode-1"]
    assert its
    assert max(one.arrival.at_s for one in its) <= 20.0
    assert drained.ended_s is not None
    assert drained.ended_s == pytest.approx(max(20.0, *(one.ended_s for one in its)))
    assert outcome.all.finished == outcome.all.requests


def test_a_flipped_worker_keeps_its_cache_and_finishes_its_requests_in_the_old_role() -> None:
    models = (replace(TWO[0], counts=Counts(1, 2)),)
    outcome, policy = ran(steady(8.0), {20.0: (Flip("decode-1", Role.ROLE_PREFILL),)}, models=models, flip_s=6.0)
    assert roles_at(policy, 25.0)["decode-1"] == ("ROLE_PREFILL", "STARTING")
    assert roles_at(policy, 30.0)["decode-1"] == ("ROLE_PREFILL", "READY")
    decoded = [one for one in outcome.journeys if one.decode == "decode-1"]
    computed = [one for one in outcome.journeys if one.prefill == "decode-1"]
    assert max(one.arrival.at_s for one in decoded) <= 20.0
    assert any(one.ended_s > 20.0 for one in decoded)
    assert min(one.arrival.at_s for one in computed) >= 26.0
    assert outcome.all.finished == outcome.all.requests
    assert next(one for one in outcome.workers if one.worker_id == "decode-1").flips == 1


@pytest.mark.parametrize("role", [Role.ROLE_PREFILL, Role.ROLE_DECODE])
def test_requests_of_a_worker_that_dies_go_on_elsewhere(role: Role.ValueType) -> None:
    models = (replace(TWO[0], counts=Counts(2, 2)),)
    outcome, _ = ran(steady(12.0), models=models, failures=(Failure(20.0, role=role),), seed=3)
    (dead,) = [one for one in outcome.workers if one.killed]
    assert dead.ended_s == 20.0
    assert outcome.all.finished == outcome.all.requests
    touched = [
        one
        for one in outcome.journeys
        if one.arrival.at_s < 20.0 < one.ended_s and (one.attempts > 1 or one.prefill == dead.worker_id)
    ]
    assert touched, "nothing was under way there: the load is too light for this test"


def test_with_no_worker_left_requests_are_refused_until_one_is_started() -> None:
    outcome, policy = ran(steady(), {25.0: (Start("m", Role.ROLE_DECODE),)}, failures=(Failure(20.0, "decode-0"),))
    lost = [one for one in outcome.journeys if one.error]
    assert {one.error for one in lost} <= {"no_worker", "worker_lost"}
    assert all(one.arrival.at_s < 35.0 for one in lost)
    assert outcome.all.refused + outcome.all.failed + outcome.all.finished == outcome.all.requests
    seen = next(one for one in policy.seen if one.at_s == 30.0)
    assert seen.traffic["m", "realtime"].refused > 0


def test_two_models_share_a_budget_and_know_nothing_of_each_others_workers() -> None:
    models = tuple(ModelSetup(name, PROFILE, Counts(1, 1), LIMITS) for name in ("a", "b"))
    load = merged(steady(model="a"), steady(2.0, model="b", service_class="nearline"))
    outcome, policy = ran(load, {10.0: (Start("b", Role.ROLE_DECODE), Start("a", Role.ROLE_DECODE))},
                          models=models, gpu_budget=5)  # fmt: skip
    assert outcome.refused_actions == 1
    assert {one.model for one in outcome.workers if one.started_s > 0} == {"b"}
    assert [(one.model, one.service_class) for one in outcome.classes] == [("a", "realtime"), ("b", "nearline")]
    for journey in outcome.journeys:
        assert journey.decode.startswith(f"{journey.arrival.model}-")
    assert set(policy.seen[-1].traffic) <= {("a", "realtime"), ("b", "nearline")}


def test_batch_requests_wait_while_realtime_ones_need_the_workers() -> None:
    burst = Synthetic(Steps([(20.0, 12.0)]), Fixed(1000), Fixed(20), 40.0, name="r")
    batch = Synthetic(Constant(8.0), Fixed(1000), Fixed(20), 40.0, service_class="batch", name="b")
    outcome, policy = ran(merged(burst, batch))
    figures = {one.service_class: one for one in outcome.classes}
    assert figures["realtime"].ttft.p50_s < figures["batch"].ttft.p50_s / 2
    assert figures["batch"].finished == figures["batch"].requests
    assert any(seen.traffic["m", "batch"].queued_tokens for seen in policy.seen if ("m", "batch") in seen.traffic)


def test_without_admission_nothing_waits_in_front_of_the_workers() -> None:
    overload = Synthetic(Constant(20.0), Fixed(1000), Fixed(20), 20.0)
    with_gate, _ = ran(overload)
    without, _ = ran(overload, admission=None)
    assert max(one.queued for one in with_gate.series) > 10
    assert max(one.queued for one in without.series) == 0
    assert max(one.waiting for one in without.series) > max(one.waiting for one in with_gate.series)


def test_a_full_queue_refuses_and_an_old_request_times_out() -> None:
    overload = Synthetic(Constant(40.0), Fixed(1000), Fixed(20), 20.0)
    outcome, _ = ran(overload, admission=AdmissionSettings(realtime_queue=50), request_timeout_s=5.0)
    assert {one.error for one in outcome.journeys} >= {"", "queue_overflow"} or outcome.all.refused > 0
    assert outcome.all.refused + outcome.all.failed + outcome.all.finished == outcome.all.requests
    assert all(one.e2e_s <= 5.0 for one in outcome.journeys if one.ended_s >= 0)


def test_what_a_policy_sees_adds_up_to_what_happened() -> None:
    outcome, policy = ran(steady())
    traffic = [one.traffic["m", "realtime"] for one in policy.seen if ("m", "realtime") in one.traffic]
    until_s = policy.seen[-1].at_s
    finished = [one for one in outcome.journeys if one.ended_s <= until_s]
    assert sum(one.arrivals for one in traffic) == sum(one.arrival.at_s <= until_s for one in outcome.journeys)
    assert sum(one.finished for one in traffic) == len(finished)
    assert sum(len(one.ttft) for one in traffic) == sum(one.first_token_s <= until_s for one in outcome.journeys)
    busy = [worker for seen in policy.seen for worker in seen.workers]
    assert all(0 <= one.prefill_busy <= 1 and 0 <= one.decode_busy <= 1 for one in busy)
    assert max(one.decode_busy for one in busy if one.role == Role.ROLE_DECODE) > 0


def test_two_runs_of_one_setup_give_the_same_bytes() -> None:
    models = (replace(TWO[0], counts=Counts(2, 2)),)
    script: dict[float, tuple[Action, ...]] = {
        10.0: (Flip("decode-1", Role.ROLE_PREFILL),),
        20.0: (Start("m", Role.ROLE_DECODE),),
    }
    first, second = (
        to_json(ran(steady(8.0), script, models=models, failures=(Failure(30.0),), seed=7)[0]) for _ in range(2)
    )
    assert first == second
    assert msgspec.json.decode(first)["outcome"]["all"]["requests"] > 0


def test_a_model_is_served_beside_another_as_it_is_alone() -> None:
    models = {name: ModelSetup(name, PROFILE, Counts(1, 1), LIMITS) for name in ("a", "b")}
    loads = {"a": steady(30.0, 10.0, model="a"), "b": steady(20.0, 10.0, model="b", service_class="batch")}
    both, _ = ran(merged(*loads.values()), models=tuple(models.values()))
    for name, model in models.items():
        alone, _ = ran(loads[name], models=(model,))
        beside = [one for one in both.journeys if one.arrival.model == name]
        assert [(one.first_token_s, one.ended_s) for one in beside] == [
            (one.first_token_s, one.ended_s) for one in alone.journeys
        ]
