"""What the planner sees of workers: in which state, since when, and how busy."""

from __future__ import annotations

from planner.observation import Observation, Traffic, WorkerSeen
from planner.observer import Observer
from slipstream.scaler import ScaledWorker
from slipstream.v1.registry_pb2 import (
    DRAINING,
    READY,
    ROLE_DECODE,
    ROLE_PREFILL,
    STARTING,
    Capacity,
    Load,
    Role,
    WorkerRecord,
    WorkerSet,
    WorkerState,
)

UNIX_S = 1_000_000.0


def record(
    name: str, role: Role.ValueType = ROLE_PREFILL, state: WorkerState.ValueType = READY, **load: int
) -> WorkerRecord:
    return WorkerRecord(
        worker_id=name, role=role, state=state, model="m", epoch=1, load=Load(**load), capacity=Capacity(blocks=100)
    )


def look(
    observer: Observer, *records: WorkerRecord, now_s: float, scaled: tuple[ScaledWorker, ...] = ()
) -> Observation:
    posted = WorkerSet(workers=records, settled=True)
    traffic = {("m", "realtime"): Traffic(arrivals=1)}
    return observer.look(posted, scaled, traffic, now_s=now_s, unix_s=UNIX_S + now_s, complete=True)


def only(seen: Observation) -> WorkerSeen:
    (worker,) = seen.workers
    return worker


def test_an_observation_holds_what_the_records_say_and_the_time_since_the_last_one() -> None:
    observer = Observer(10.0)
    told = record("w", ROLE_DECODE, running=3, waiting=1, waiting_tokens=50, context_tokens=900, blocks_used=25)
    seen = look(observer, told, now_s=15.0)
    assert (seen.at_s, seen.unix_s, seen.interval_s, seen.complete) == (15.0, UNIX_S + 15.0, 5.0, True)
    assert seen.traffic["m", "realtime"].arrivals == 1
    one = only(seen)
    assert (one.worker_id, one.model, one.role, one.state, one.gpus) == ("w", "m", ROLE_DECODE, READY, 1)
    assert (one.running, one.waiting, one.waiting_tokens, one.context_tokens, one.kv_use) == (3, 1, 50, 900, 0.25)


def test_time_in_a_state_begins_anew_with_each_state_role_and_incarnation() -> None:
    observer = Observer(0.0)
    starting, ready, flipped = record("w", state=STARTING), record("w"), record("w", ROLE_DECODE)
    restarted = record("w", ROLE_DECODE)
    restarted.epoch = 2
    steps = [(starting, 1.0), (starting, 1.0), (ready, 3.0), (ready, 3.0), (flipped, 5.0), (restarted, 6.0)]
    assert [only(look(observer, one, now_s=float(at))).since_s for at, (one, _) in enumerate(steps, 1)] == [
        since_s for _, since_s in steps
    ]
    look(observer, now_s=7.0)
    assert only(look(observer, restarted, now_s=8.0)).since_s == 8.0, "it was gone"


def test_a_worker_is_busy_for_the_share_of_sets_in_which_it_had_something_to_do() -> None:
    observer = Observer(0.0)
    for waiting, context in ((9, 0), (9, 5), (0, 0), (0, 0)):
        observer.note([record("w", waiting_tokens=waiting, context_tokens=context)])
    one = only(look(observer, record("w"), now_s=2.0))
    assert (one.prefill_busy, one.decode_busy) == (0.5, 0.25)
    one = only(look(observer, record("w", waiting_tokens=9), now_s=4.0))
    assert (one.prefill_busy, one.decode_busy) == (0.0, 0.0), "of each interval anew"


def test_a_worker_that_was_started_and_has_not_registered_is_starting() -> None:
    observer = Observer(0.0)
    started = ScaledWorker("new", "m", ROLE_DECODE, started_s=UNIX_S + 3.0)
    one = only(look(observer, now_s=5.0, scaled=(started,)))
    assert (one.worker_id, one.role, one.state, one.since_s) == ("new", ROLE_DECODE, STARTING, 3.0)
    one = only(look(observer, record("new", ROLE_DECODE), now_s=6.0, scaled=(started,)))
    assert one.state == READY, "from then on its own word counts"


def test_a_wall_clock_that_jumps_makes_no_start_longer_or_shorter() -> None:
    for jump_s, since_s in ((3600.0, 2.0), (-3600.0, 5.0)):  # before the first look at it: the last one, or this one
        observer = Observer(0.0)
        look(observer, now_s=2.0)
        started = ScaledWorker("new", "m", ROLE_DECODE, started_s=UNIX_S + 4.0 - jump_s)
        for now_s in (5.0, 6.0):
            assert only(look(observer, now_s=now_s, scaled=(started,))).since_s == since_s
    early = ScaledWorker("early", "m", ROLE_DECODE, started_s=UNIX_S - 30.0)
    observer = Observer(0.0)
    assert only(look(observer, now_s=1.0, scaled=(early,))).since_s == -30.0, "from before this process"
    jumped = observer.look(WorkerSet(settled=True), (early,), {}, now_s=2.0, unix_s=UNIX_S + 7200.0, complete=True)
    assert only(jumped).since_s == -30.0


def test_a_worker_that_lost_its_registration_starts_anew_however_old_it_is() -> None:
    observer = Observer(0.0)
    old = ScaledWorker("w", "m", ROLE_DECODE, started_s=UNIX_S - 300_000.0)
    assert only(look(observer, record("w"), now_s=1.0, scaled=(old,))).state == READY
    assert only(look(observer, record("w"), now_s=3.0, scaled=(old,))).state == READY
    again = only(look(observer, now_s=5.0, scaled=(old,)))
    assert (again.state, again.since_s) == (STARTING, 3.0)


def test_a_worker_that_was_asked_to_end_is_draining_before_the_registry_hears_it() -> None:
    ending = ScaledWorker("w", "m", ROLE_DECODE, started_s=UNIX_S, ending=True)
    for records in ((), (record("w"),), (record("w", state=DRAINING),)):
        assert only(look(Observer(0.0), *records, now_s=5.0, scaled=(ending,))).state == DRAINING


def test_nothing_is_complete_while_the_registry_has_not_settled() -> None:
    seen = Observer(0.0).look(WorkerSet(), (), {}, now_s=1.0, unix_s=UNIX_S, complete=True)
    assert not seen.complete
