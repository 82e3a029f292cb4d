"""The live loop, stepped by hand: who acts, what is told of it, and that no failure ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from planner.history import Outcome
from planner.loop import PlannerLoop
from planner.loop_metrics import PlannerCollector
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.observation import Observation
from planner.scaling import Action, Counts, Decision, Drain, Flip, Start
from planner.traffic import SILENT_AFTER_S
from slipstream.errors import ConfigError, UnavailableError
from slipstream.performance import Profile
from slipstream.scaler import ScaledWorker, SickWorker
from slipstream.v1.planner_pb2 import TrafficPart, TrafficReport
from slipstream.v1.registry_pb2 import (
    DRAINING,
    FENCED,
    READY,
    ROLE_DECODE,
    ROLE_PREFILL,
    STARTING,
    Health,
    HealthState,
    Role,
    WorkerRecord,
    WorkerSet,
)
from tests.support.scripted_worker import until
from tests.unit.frontend.router.workers import PROFILE

OBJECTIVES = PlannerObjectives((ModelObjectives("m", {"realtime": Objective(2.0, 0.05)}),), gpu_budget=8)
ACTIONS = (Start("m", ROLE_DECODE), Drain("w0"), Flip("w1", ROLE_PREFILL))


@dataclass(slots=True)
class Time:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class MemoryScaler:
    """Runs workers that are names, and gives the lease to whoever comes first."""

    time: Time
    running: list[ScaledWorker] = field(default_factory=list)
    done: list[tuple[str, ...]] = field(default_factory=list)
    down: bool = False
    full: bool = False
    drains_instead: str = ""
    holder: str = ""
    until_s: float = 0.0

    def _answer(self) -> None:
        if self.down:
            raise UnavailableError("nobody answers")

    async def workers(self) -> Sequence[ScaledWorker]:
        self._answer()
        return self.running

    async def start(self, model: str, role: Role.ValueType) -> str:
        if self.full:
            raise UnavailableError("no room")
        self.done.append(("start", model))
        return "new"

    async def drain(self, worker_id: str) -> str:
        self.done.append(("drain", worker_id))
        return self.drains_instead or worker_id

    async def flip(self, worker_id: str, role: Role.ValueType) -> None:
        self.done.append(("flip", worker_id))

    async def hold_lease(self, holder: str, lease_s: float) -> bool:
        self._answer()
        if self.holder not in ("", holder) and self.time() < self.until_s:
            return False
        self.holder, self.until_s = holder, self.time() + lease_s
        return True

    async def release_lease(self, holder: str) -> None:
        if self.holder == holder:
            self.holder = ""


@dataclass(slots=True)
class Scripted:
    """A policy that decides the same each time."""

    objectives: PlannerObjectives
    actions: tuple[Action, ...] = ACTIONS
    seen: list[Observation] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    not_done: list[Action] = field(default_factory=list)
    broken: bool = False
    before: object = None

    def decide(self, seen: Observation) -> Decision:
        self.seen.append(seen)
        if self.broken:
            raise ZeroDivisionError
        return Decision(seen.at_s, {"m": Counts(1, 2)}, self.actions, "because")

    def know(self, model: str, prefill: Profile, decode: Profile) -> None:
        self.known.append(prefill.name)

    def inherit(self, before: object) -> None:
        self.before = before

    def start_s(self, model: str) -> float:
        return 7.0

    def undone(self, action: Action) -> None:
        self.not_done.append(action)


@dataclass(slots=True)
class World:
    """A cluster in memory, and the planners that look at it."""

    time: Time = field(default_factory=Time)
    posted: WorkerSet = field(default_factory=lambda: WorkerSet(settled=True))
    policies: list[Scripted] = field(default_factory=list)
    scaler: MemoryScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = MemoryScaler(self.time)

    def planner(self, holder: str = "one", *, dry_run: bool = False) -> PlannerLoop:
        loop = PlannerLoop(
            OBJECTIVES,
            self.policy,
            self.scaler,
            lambda: self.posted,
            dry_run=dry_run,
            holder=holder,
            clock=self.time,
            unix_clock=lambda: 1e9 + self.time(),
        )
        self.time.now_s += SILENT_AFTER_S
        return loop

    def policy(self, objectives: PlannerObjectives) -> Scripted:
        if objectives.gpu_budget == 666:
            raise ConfigError("gpu_budget: not this one", param="gpu_budget")
        self.policies.append(Scripted(objectives))
        return self.policies[-1]


@pytest.fixture
def world() -> World:
    return World()


async def test_the_leader_does_what_was_decided_in_order_and_keeps_what_came_of_it(world: World) -> None:
    loop = world.planner()
    made = await loop.step()
    assert world.scaler.done == [("start", "m"), ("drain", "w0"), ("flip", "w1")]
    assert loop.history.latest is not None
    assert made is not None
    assert (made.number, made.leading, made.decision.reason) == (1, True, "because")
    assert loop.history.latest.outcomes == (Outcome("new"), Outcome("w0"), Outcome("w1"))


async def test_of_two_planners_one_acts_and_the_other_goes_on_when_it_is_silent(world: World) -> None:
    first, second = world.planner("one"), world.planner("two")
    await first.step()
    await second.step()
    assert (first.leading, second.leading) == (True, False)
    assert len(world.scaler.done) == len(ACTIONS)
    assert len(world.policies[1].seen) == 1, "it looks and decides all the same"
    assert (world.policies[0].not_done, world.policies[1].not_done) == ([], list(ACTIONS))
    world.time.now_s += first.lease_s
    await second.step()
    assert second.leading
    await first.step()
    assert not first.leading, "who slept through its lease's end acts no more"
    assert len(world.scaler.done) == 2 * len(ACTIONS)


async def test_one_that_has_just_begun_leaves_the_lease_to_one_that_stood_by(world: World) -> None:
    first, second = world.planner("one"), world.planner("two")
    await first.step()
    await second.step()
    world.time.now_s += first.lease_s
    restarted = world.planner("restarted")
    world.time.now_s -= 1.0
    await restarted.step()
    assert not restarted.leading, "nobody holds the lease, and it has not heard everybody"
    await second.step()
    assert second.leading
    world.time.now_s += 1.0
    await restarted.step()
    assert not restarted.leading


async def test_a_planner_that_ends_gives_its_lease_back(world: World) -> None:
    loop = world.planner()
    following = asyncio.create_task(loop.follow())
    await until(lambda: bool(world.scaler.holder))
    following.cancel()
    await asyncio.wait([following])
    assert world.scaler.holder == ""
    assert not loop.leading


async def test_a_dry_run_tells_and_does_nothing(world: World) -> None:
    loop = world.planner(dry_run=True)
    made = await loop.step()
    assert made is not None
    assert (made.dry_run, made.leading, made.decision.actions) == (True, False, ACTIONS)
    assert (world.scaler.done, world.scaler.holder) == ([], "")


async def test_an_action_that_fails_is_told_with_its_reason_and_the_others_are_done(world: World) -> None:
    loop, world.scaler.full = world.planner(), True
    await loop.step()
    assert loop.history.latest is not None
    assert loop.history.latest.outcomes == (Outcome(error="no room"), Outcome("w0"), Outcome("w1"))
    assert (loop.acted["start", "failed"], loop.acted["drain", "done"]) == (1, 1)
    assert world.policies[0].not_done == [ACTIONS[0]], "the policy does not wait for what will not come"


async def test_where_another_worker_ends_than_was_meant_the_policy_goes_on_counting_on_the_first(world: World) -> None:
    loop, world.scaler.drains_instead = world.planner(), "last-of-its-pool"
    await loop.step()
    assert loop.history.latest is not None
    assert loop.history.latest.outcomes[1] == Outcome("last-of-its-pool")
    assert world.policies[0].not_done == [ACTIONS[1]]


async def test_without_its_scaler_a_planner_decides_and_waits(world: World) -> None:
    loop, world.scaler.down = world.planner(), True
    assert await loop.step() is not None
    assert (loop.leading, world.scaler.done) == (False, [])
    assert (loop.errors["workers"], loop.errors["hold_lease"]) == (1, 1)
    world.scaler.down = False
    await loop.step()
    assert loop.leading


async def test_a_policy_that_breaks_costs_its_decision_and_nothing_else(world: World) -> None:
    loop = world.planner()
    world.policies[0].broken = True
    assert await loop.step() is None
    assert loop.errors["decide"] == 1
    world.policies[0].broken = False
    assert await loop.step() is not None


async def test_nothing_is_done_before_everybody_had_the_time_to_be_heard(world: World) -> None:
    loop, world.posted.settled = world.planner(), False
    await loop.step()
    assert (world.scaler.done, loop.leading) == ([], True)
    world.posted.settled = True
    await loop.step()
    assert world.scaler.done


async def test_it_sees_workers_traffic_and_what_was_only_just_started(world: World) -> None:
    loop = world.planner()
    world.posted.workers.append(WorkerRecord(worker_id="w", role=ROLE_PREFILL, state=READY, model="m"))
    world.scaler.running.append(ScaledWorker("new", "m", ROLE_DECODE, 1e9))
    part = TrafficPart(model="m", service_class="batch", arrivals=3)
    assert loop.take_report(TrafficReport(frontend_id="f", sequence=1, interval_s=1.0, parts=[part])) > 0
    await loop.step()
    (seen,) = world.policies[0].seen
    assert [(one.worker_id, one.state) for one in seen.workers] == [("new", STARTING), ("w", READY)]
    assert (seen.traffic["m", "batch"].arrivals, loop.frontends) == (3, 1)
    assert loop.seen is seen


async def test_another_policy_is_in_force_from_the_next_decision_on_and_knows_the_workers(world: World) -> None:
    loop = world.planner()
    loop.know("m", PROFILE, PROFILE)
    other = PlannerObjectives(OBJECTIVES.models, gpu_budget=4)
    loop.apply(other, dry_run=True)
    assert loop.objectives is OBJECTIVES
    with pytest.raises(ConfigError):
        loop.apply(PlannerObjectives(OBJECTIVES.models, gpu_budget=666))
    assert loop.objectives is OBJECTIVES
    loop.apply(other)
    await loop.step()
    assert (loop.objectives, world.policies[-1].objectives) == (other, other)
    assert (len(world.policies[-1].seen), world.policies[-1].known) == (1, [PROFILE.name])


async def test_metrics_tell_targets_workers_actions_and_who_leads(world: World) -> None:
    loop, registry = world.planner(), CollectorRegistry()
    registry.register(PlannerCollector(loop))
    assert b"slipstream_planner_decisions_total 0.0" in generate_latest(registry)
    world.posted.workers.append(WorkerRecord(worker_id="w", role=ROLE_PREFILL, state=READY, model="m"))
    await loop.step()
    text = generate_latest(registry).decode()
    for line in (
        "slipstream_planner_leader 1.0",
        "slipstream_planner_decisions_total 1.0",
        'slipstream_planner_target_workers{model="m",role="decode"} 2.0',
        'slipstream_planner_actual_workers{model="m",role="prefill"} 1.0',
        'slipstream_planner_actions_total{kind="flip",result="done"} 1.0',
        'slipstream_planner_errors_total{call="decide"} 0.0',
    ):
        assert line in text


@dataclass(slots=True)
class ReportingScaler(MemoryScaler):
    """One that can tell somebody."""

    told: list[SickWorker] = field(default_factory=list)

    async def report(self, sick: SickWorker) -> None:
        self.told.append(sick)


async def test_a_fenced_worker_is_reported_replaced_and_ended_and_the_policy_sees_one_go_and_one_come() -> None:
    world = World()
    world.scaler = scaler = ReportingScaler(world.time)
    health = Health(state=HealthState.SICK, fenced_unix_s=int(1e9 + world.time.now_s) + 10)
    sick = WorkerRecord(worker_id="w0", model="m", role=ROLE_DECODE, state=FENCED, epoch=1, health=health)
    world.posted.workers.append(sick)
    scaler.running.append(ScaledWorker("w0", "m", ROLE_DECODE, 1e9))
    loop = world.planner()
    policy = world.policies[0]
    policy.actions = ()
    world.time.now_s += 20.0
    await loop.step()
    assert scaler.done == [("start", "m")]
    assert [one.worker_id for one in scaler.told] == ["w0"]
    assert {one.worker_id: one.state for one in policy.seen[-1].workers} == {"w0": DRAINING, "new": STARTING}
    scaler.running.append(ScaledWorker("new", "m", ROLE_DECODE, 1e9 + world.time.now_s))
    world.posted.workers.append(WorkerRecord(worker_id="new", model="m", role=ROLE_DECODE, state=READY, epoch=2))
    await loop.step()
    assert scaler.done == [("start", "m"), ("drain", "w0")]
    assert len(scaler.told) == 1
    assert loop.replaced == {"done": 1}


async def test_a_planner_that_stands_by_replaces_nobody() -> None:
    world = World()
    world.scaler.holder, world.scaler.until_s = "another", 1e12
    world.posted.workers.append(WorkerRecord(worker_id="w0", model="m", role=ROLE_DECODE, state=FENCED, epoch=1))
    world.scaler.running.append(ScaledWorker("w0", "m", ROLE_DECODE, 1e9))
    loop = world.planner()
    await loop.step()
    assert world.scaler.done == []
