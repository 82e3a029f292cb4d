"""Fenced workers get a replacement first and are ended then; what a planner forgot it sees again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.replacing import RETRY_S, Replacements, Step, sick_worker
from planner.scaling import Drain, Start
from slipstream.scaler import ScaledWorker
from slipstream.v1.registry_pb2 import Health, HealthReason, HealthState, Role, WorkerRecord, WorkerState
from slipstream.worker_settings import HealthSettings

DECODE = Role.ROLE_DECODE
UNIX_S = 1.7e9
READY, FENCED, STARTING = WorkerState.READY, WorkerState.FENCED, WorkerState.STARTING


@dataclass
class World:
    """Workers that a scaler runs, all of one pool, and the planner's replacements of them."""

    room: int = 10
    limits: HealthSettings = field(default_factory=HealthSettings)
    now_s: float = 0.0
    records: dict[str, WorkerRecord] = field(default_factory=dict)
    scaled: dict[str, ScaledWorker] = field(default_factory=dict)
    starts: int = 0
    drains: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.replacements = Replacements(self.limits)

    def add(self, name: str, state: WorkerState.ValueType = READY) -> None:
        self.scaled[name] = ScaledWorker(name, "m", DECODE, UNIX_S + self.now_s)
        self.records[name] = WorkerRecord(worker_id=name, epoch=1, role=DECODE, model="m", state=state)
        self.records[name].health.state = HealthState.HEALTHY

    def make_sick(self, name: str, *, fenced: bool = True) -> None:
        record = self.records[name]
        record.state = FENCED if fenced else READY
        record.health.CopyFrom(Health(state=HealthState.SICK, since_unix_s=int(UNIX_S + self.now_s)))
        record.health.fenced_unix_s = int(UNIX_S + self.now_s) if fenced else 0

    def step(self, seconds: float = 5.0) -> list[Step]:
        """One interval: what was asked is done as far as there is room."""
        self.now_s += seconds
        steps = self.replacements.steps(
            list(self.records.values()), list(self.scaled.values()), self.now_s, UNIX_S + self.now_s
        )
        for step in steps:
            if isinstance(step.action, Start):
                if len(self.scaled) >= self.room:
                    self.replacements.failed(step, self.now_s)
                    continue
                self.starts += 1
                name = f"new-{self.starts}"
                self.add(name, STARTING)
                self.replacements.done(step, name, self.now_s)
            else:
                name = step.action.worker_id
                self.drains.append(name)
                self.replacements.done(step, name, self.now_s)
                del self.scaled[name], self.records[name]
        return steps

    def ready(self) -> None:
        """What was started is there."""
        for record in self.records.values():
            if record.state == STARTING:
                record.state = READY


def a_world(**fields: object) -> World:
    world = World(**fields)  # type: ignore[arg-type]
    world.add("a")
    world.add("b")
    world.now_s = 100.0
    return world


def test_another_is_started_and_only_when_it_is_ready_the_sick_one_is_ended() -> None:
    world = a_world()
    world.make_sick("a")
    assert [step.action for step in world.step()] == [Start("m", DECODE)]
    for _ in range(5):
        assert world.step() == [], "nothing is started twice, and nothing is ended before the other is there"
    world.ready()
    assert [step.action for step in world.step()] == [Drain("a")]
    assert world.step() == []
    assert sorted(world.scaled) == ["b", "new-1"]


def test_a_planner_that_takes_over_starts_none_twice() -> None:
    world = a_world()
    world.make_sick("a")
    world.step()
    world.replacements = Replacements(world.limits)
    assert world.step() == []
    world.ready()
    assert [step.action for step in world.step()] == [Drain("a")]


def test_where_there_is_no_room_for_both_the_sick_one_goes_first_and_its_place_is_filled() -> None:
    world = a_world(room=2)
    world.make_sick("a")
    assert [step.action for step in world.step()] == [Start("m", DECODE)]
    assert [step.action for step in world.step()] == [Drain("a")]
    assert [step.action for step in world.step(RETRY_S)] == [Start("m", DECODE)]
    assert sorted(world.scaled) == ["b", "new-1"]
    assert world.step(60.0) == []


def test_a_replacement_that_never_comes_does_not_keep_the_sick_one_for_ever() -> None:
    world = a_world(limits=HealthSettings(replacement_timeout_s=60.0))
    world.make_sick("a")
    world.step()
    world.step(30.0)
    assert world.drains == []
    world.step(60.0)
    assert world.drains == ["a"]


def test_a_sick_worker_that_is_alone_serves_until_another_is_there() -> None:
    world = a_world()
    del world.scaled["b"], world.records["b"]
    world.make_sick("a", fenced=False)
    assert [step.action for step in world.step()] == [Start("m", DECODE)]
    assert world.replacements.leaving(list(world.records.values())) == {"a"}
    assert world.step(10_000.0) == []
    world.ready()
    assert world.step() == [], "its peer is healthy now: it is fenced first"
    world.make_sick("a")
    assert [step.action for step in world.step()] == [Drain("a")]
    assert (world.starts, sorted(world.scaled)) == (1, ["new-1"])


def test_within_an_hour_only_so_many_are_started() -> None:
    world = a_world(limits=HealthSettings(replacements_per_hour=1))
    for name in ("c", "d"):
        world.add(name)
    world.now_s += 50.0
    world.make_sick("a")
    world.make_sick("b")
    for _ in range(20):
        world.step()
    assert world.starts == 1
    world.step(3600.0)
    assert sorted(world.drains) == ["a", "b"], "it has waited long enough, and does nothing where it is"
    world.step(RETRY_S)
    assert world.starts == 2


def test_where_another_one_ends_than_is_meant_no_more_are_taken_away() -> None:
    world = a_world()
    world.make_sick("a")
    world.step()
    world.ready()
    (step,) = world.replacements.steps(list(world.records.values()), list(world.scaled.values()), 200.0, UNIX_S)
    world.replacements.done(step, "b", 200.0)
    world.now_s = 300.0
    assert world.step(600.0) == []


def test_workers_that_somebody_else_runs_are_let_be() -> None:
    world = a_world()
    del world.scaled["a"]
    world.make_sick("a")
    assert world.step() == []


@pytest.mark.parametrize(
    ("code", "device"), [("xid_79", True), ("gpu_lost", True), ("told_sick", False), ("memory_pressure", False)]
)
def test_its_owner_hears_whether_the_device_is_what_is_wrong(code: str, device: bool) -> None:
    reason = HealthReason(code=code, state=HealthState.SICK, text="why")
    health = Health(state=HealthState.SICK, reasons=[reason], device_ids=["GPU-a"])
    told = sick_worker(WorkerRecord(worker_id="w", node="n7", health=health))
    assert (told.worker_id, told.node, told.device_ids, told.device, told.reasons) == (
        "w",
        "n7",
        ("GPU-a",),
        device,
        ("why",),
    )


@given(st.lists(st.sampled_from(["sick", "ready", "restart", "wait"]), max_size=40), st.integers(4, 8))
def test_whatever_happens_the_pool_keeps_its_size_and_none_is_replaced_twice(events: list[str], room: int) -> None:
    limits = HealthSettings(replacements_per_hour=1000, replacement_timeout_s=86400)
    world = World(room=room, limits=limits)
    for number in range(4):
        world.add(f"w{number}")
    world.now_s, fenced = 1000.0, 0
    for event in events:
        serving = sorted(name for name, one in world.records.items() if one.state == READY)
        if event == "sick" and len(serving) > 1:
            world.make_sick(serving[0])
            fenced += 1
        elif event == "ready":
            world.ready()
        elif event == "restart" and room == 8:  # what is owed for those that were ended first is forgotten
            world.replacements = Replacements(limits)
        world.step(RETRY_S)
        assert world.starts <= fenced
        assert len(world.scaled) <= room
    for _ in range(20):
        world.ready()
        world.step(RETRY_S)
    assert len(world.scaled) == 4
    assert (world.starts, len(world.drains)) == (fenced, fenced)
    assert not any(one.state == FENCED for one in world.records.values())
