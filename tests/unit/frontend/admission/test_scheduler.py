"""The scheduler under load, in virtual time."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.admission.claim import Priority, Stage
from frontend.admission.in_flight import Bottleneck, ClusterRoom, Others
from frontend.admission.scheduler import Scheduler
from slipstream.errors import DeadlineUnreachableError, LongWaitError, OverloadedError, QueueFullError
from tests.support.admission_loop import Job, Loop, job, percentile, policy

SECONDS = 60.0


def arrivals(tenant: str, rate: float, seed: int, priority: Priority = Priority.REALTIME) -> list[Job]:
    """Poisson arrivals of prompts of half to one and a half times 0.1 s, over a minute."""
    chance, at_s, jobs = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate)) < SECONDS:
        size = chance.uniform(0.5, 1.5)
        jobs.append(job(at_s, tenant, priority, work=4000 * size, prefill_s=0.1 * size))
    return jobs


def run(
    jobs: list[Job], *, prefill_workers: int = 4, places: int = 1000, transfer_s: float = 0.03, **how: float
) -> Loop:
    each = int(how.pop("each", 500))
    frontends = int(how.pop("frontends", 1))
    first, *others = (Scheduler[Job](policy(each=each, **how), 0.0) for _ in range(frontends))  # type: ignore[arg-type]
    loop = Loop(first, prefill_workers, places, transfer_s, others=others)
    loop.run(sorted(jobs, key=lambda one: one.arrived_s))
    return loop


def ttft_p99_s(jobs: list[Job]) -> float:
    assert all(one.refused is None and not one.dropped for one in jobs)
    return percentile([one.ttft_s for one in jobs], 0.99)


@pytest.mark.parametrize("prefill_workers", [4, 16])
def test_a_tenants_flood_leaves_anothers_time_to_first_token_below_twice_its_quiet_value(prefill_workers: int) -> None:
    rate = 2.0 * prefill_workers  # a fifth of what the workers do
    quiet, beside = arrivals("calm", rate, 1), arrivals("calm", rate, 1)
    run(quiet, prefill_workers=prefill_workers)
    flood = arrivals("flood", 10 * rate, 2)
    run(beside + flood, prefill_workers=prefill_workers)
    assert ttft_p99_s(beside) < 2 * ttft_p99_s(quiet)
    # The flood has what is left, and is told when to come back.
    answered = [one for one in flood if one.first_token_at_s is not None]
    assert len(answered) > 6 * rate * SECONDS / 2
    refused = [one.refused for one in flood if one.refused is not None]
    assert refused
    assert all((error.retry_after_s or 0) >= 1 for error in refused)


@pytest.mark.parametrize("prefill_workers", [2, 4, 16])
@pytest.mark.parametrize("flood_comes", ["to both frontends", "to the other frontend"])
@pytest.mark.parametrize("priority", [Priority.REALTIME, Priority.BATCH])
def test_the_same_with_two_frontends_that_share_the_workers(
    prefill_workers: int, flood_comes: str, priority: Priority
) -> None:
    rate = 2.0 * prefill_workers
    quiet, beside = arrivals("calm", rate, 1), arrivals("calm", rate, 1)
    flood, chance = arrivals("flood", 10 * rate, 2, priority), random.Random(3)
    for one, same in zip(quiet, beside, strict=True):
        one.frontend = same.frontend = chance.randrange(2) if flood_comes == "to both frontends" else 0
    for one in flood:
        one.frontend = chance.randrange(2) if flood_comes == "to both frontends" else 1
    run(quiet, prefill_workers=prefill_workers, frontends=2)
    run(beside + flood, prefill_workers=prefill_workers, frontends=2)
    assert ttft_p99_s(beside) < 2 * ttft_p99_s(quiet)
    answered = [one for one in flood if one.first_token_at_s is not None]
    assert len(answered) > 6 * rate * SECONDS / 2


def test_tenants_that_nobody_knows_yet_do_not_all_go_at_once() -> None:
    jobs = [job(0.001 * number, f"tenant-{number}") for number in range(200)]
    loop = run(jobs, prefill_workers=4, places=1000, transfer_s=0.0)
    # decode_s later all of them are in decode; no worker had more than one prompt beyond the one it computes.
    assert loop.most_computing <= 2 * 4


def test_workers_are_kept_busy_and_have_no_queue_of_their_own() -> None:
    # Two and a half times of what four workers do; somebody else is there, too.
    jobs = [job(0.0, "b"), job(30.0, "b"), *arrivals("a", 100, 3)]
    loop = run(jobs, prefill_workers=4, transfer_s=0.05)
    answered = [one for one in jobs if one.first_token_at_s is not None]
    ended_s = max(one.first_token_at_s or 0.0 for one in answered)
    computed_s = sum(one.prefill_s for one in answered)
    assert computed_s > 0.97 * 4 * ended_s
    # Sent to first token: its own prompt, the transfer, and next to no wait.
    waits_s = [(one.first_token_at_s or 0.0) - one.sent_s - one.prefill_s - 0.05 for one in answered]
    assert percentile(waits_s, 0.5) < 0.03
    assert percentile(waits_s, 0.99) < 0.15
    assert loop.scheduler.in_flight.open == 0


def test_decode_places_bound_what_is_in_flight() -> None:
    jobs = [job(0.01 * number, decode_s=5.0) for number in range(100)]
    loop = run(jobs, places=12)
    assert loop.most_in_flight == 12
    assert all(one.first_token_at_s is not None for one in jobs)


def test_full_kv_caches_hold_requests_back() -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(), 0.0)
    scheduler.take_room(ClusterRoom(prefill_workers=8, decode_workers=1, kv_tokens=10_000), 0.0)
    admitted = [scheduler.arrive(job(0.0), 0.0).admitted for _ in range(5)]
    assert admitted == [True, True, True, False, False]


def test_what_other_frontends_have_at_the_workers_counts() -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(), 0.0)
    scheduler.take_room(ClusterRoom(8, 1, places=10, open_requests=8), 0.0)
    admitted = [scheduler.arrive(job(0.0), 0.0).admitted for _ in range(4)]
    assert admitted == [True, True, False, False]
    assert scheduler.in_flight.bottleneck(0.0) is Bottleneck.DECODE


@pytest.mark.parametrize(("places", "part"), [(0, 2), (3, 1)])
def test_of_several_frontends_each_has_its_part_whatever_the_others_have(places: int, part: int) -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(), 0.0)
    scheduler.take_room(ClusterRoom(8, 1, places=places, open_requests=places, frontends=3), 0.0)
    scheduler.take_others(Others(frontends=3, prefill_workers=8), 0.0)
    assert [scheduler.arrive(job(0.0), 0.0).admitted for _ in range(3)] == [one < part for one in range(3)]


@pytest.mark.parametrize(("own", "others", "granted"), [(8, 0, 0), (0, 8, 1)])
def test_a_frontend_that_had_little_lately_need_not_wait_for_its_part(own: int, others: int, granted: int) -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(), 0.0)
    scheduler.take_room(ClusterRoom(8, 1, frontends=2), 0.0)
    assert all(scheduler.arrive(job(0.0), 0.0).admitted for _ in range(own))
    scheduler.take_others(Others(frontends=2, prefill_workers=others), 0.5)
    scheduler.take_others(Others(frontends=2, prefill_workers=8), 1.0)
    at_once = [scheduler.arrive(job(1.0), 1.0).admitted for _ in range(5)]
    assert at_once == [not own] * 4 + [False], "its part are 4 of 8 workers"
    assert len(scheduler.step(1.0).granted) == granted


def test_a_prompt_that_takes_longer_than_predicted_holds_its_worker_until_it_is_done() -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(), 0.0)
    scheduler.take_room(ClusterRoom(prefill_workers=1, decode_workers=1), 0.0)
    slow, waiting = job(0.0), job(0.0)
    assert scheduler.arrive(slow, 0.0).admitted
    assert not scheduler.arrive(waiting, 0.0).admitted
    assert scheduler.step(1.99).granted == [waiting]  # done after 2 s, it was predicted
    late = job(3.0)
    assert not scheduler.arrive(late, 3.0).admitted
    assert scheduler.step(100.0).granted == []
    scheduler.computed(slow, 100.0)
    scheduler.computed(waiting, 100.1)
    assert scheduler.step(100.1).granted == [late]


def test_short_prompts_go_together_as_an_engine_computes_them() -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(), 0.0)
    scheduler.take_room(ClusterRoom(prefill_workers=2, decode_workers=1), 0.0)
    tenants = ["a", "b"] * 4
    assert [scheduler.arrive(job(0.0, one, work=300), 0.0).admitted for one in tenants] == [True] * 7 + [False]


def sent_of_a_crowd(*before: Job, at_s: float, **limits: float) -> int:
    """Of fifty prompts of half a second each, one after the other for two workers, what goes to them at once."""
    scheduler: Scheduler[Job] = Scheduler(policy(**limits), 0.0)  # type: ignore[arg-type]
    scheduler.take_room(ClusterRoom(prefill_workers=2, decode_workers=1), 0.0)
    for one in before:
        scheduler.arrive(one, one.arrived_s)
        scheduler.end(one, one.arrived_s)
    return sum(scheduler.arrive(job(at_s, "a", work=1000), at_s).admitted for _ in range(50))


def test_what_is_of_one_tenant_waits_at_the_workers_for_half_the_time_to_first_token_and_no_longer() -> None:
    # An engine that has a choice of prompts computes short ones together; nobody else loses by it.
    assert sent_of_a_crowd(at_s=0.0) == 2 + 2
    assert sent_of_a_crowd(at_s=0.0, ttft_slo_s=4.0) == 2 + 6


def test_with_a_second_tenant_or_class_lately_prompts_wait_in_the_frontend() -> None:
    another, batch = job(0.0, "b"), job(0.0, "a", Priority.BATCH)
    assert sent_of_a_crowd(another, at_s=1.0) == 2 + 1  # one short prompt more: a step is not full yet
    assert sent_of_a_crowd(batch, at_s=1.0) == 2 + 1
    assert sent_of_a_crowd(another, at_s=100.0) == 2 + 1, "it is a second tenant that comes"


def test_without_workers_everything_passes_so_that_the_dispatcher_says_what_is_wrong() -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(), 0.0)
    assert all(scheduler.arrive(job(0.0), 0.0).admitted for _ in range(100))


def busy(**limits: float) -> Scheduler[Job]:
    """One prefill worker, with a prompt that will take long."""
    scheduler: Scheduler[Job] = Scheduler(policy(**limits), 0.0)  # type: ignore[arg-type]
    scheduler.take_room(ClusterRoom(prefill_workers=1, decode_workers=1), 0.0)
    assert scheduler.arrive(job(0.0, work=1e6), 0.0).admitted
    return scheduler


def test_a_deadline_that_comes_before_the_predicted_turn_is_refused_at_once() -> None:
    scheduler = busy()
    for _ in range(50):
        scheduler.arrive(job(0.0, work=2000.0), 0.0)
    with pytest.raises(DeadlineUnreachableError, match=r"predicted wait of \d+\.\d s .* 5\.0 s") as caught:
        scheduler.arrive(job(0.0, work=2000.0, timeout_s=5.0), 0.0)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 5
    assert not scheduler.arrive(job(0.0, work=2000.0, timeout_s=500.0), 0.0).admitted


def test_those_who_find_the_queue_full_are_told_to_come_back_one_after_the_other() -> None:
    scheduler, waits, refused = busy(each=5, total=5), [], [job(0.0, work=4000.0) for _ in range(20)]
    for _ in range(5):
        scheduler.arrive(job(0.0, work=1000.0), 0.0)
    for one in refused:
        with pytest.raises(QueueFullError) as caught:
            scheduler.arrive(one, 0.0)
        waits.append(caught.value.retry_after_s or 0.0)
    assert waits == sorted(waits)
    assert len(set(waits)) == len(waits)
    assert waits[0] >= 1


def test_who_would_wait_for_longer_than_its_class_may_is_refused_and_let_in_when_it_comes_back_in_time() -> None:
    scheduler = busy(wait_s=1.0)
    waiting = [job(0.0, work=2000.0) for _ in range(2)]
    for one in waiting:
        assert not scheduler.arrive(one, 0.0).admitted
    late, stranger = job(0.0, work=2000.0), job(0.0, work=2000.0)
    with pytest.raises(LongWaitError, match=r"realtime requests wait for up to 1 s") as caught:
        scheduler.arrive(late, 0.0)
    told_s = caught.value.retry_after_s or 0.0
    assert told_s >= 1
    for one in waiting:
        scheduler.end(one, told_s)
    for _ in range(20):
        with suppress(LongWaitError):
            scheduler.arrive(job(told_s, work=200.0), told_s)
    with pytest.raises(LongWaitError):
        scheduler.arrive(stranger, told_s)
    assert not scheduler.arrive(late, told_s).admitted, "it is queued, where others are refused"


def test_one_of_a_class_may_wait_however_slow_the_workers_are() -> None:
    scheduler = busy(wait_s=0.001)
    assert not scheduler.arrive(job(0.0, work=1e6), 0.0).admitted
    with pytest.raises(LongWaitError):
        scheduler.arrive(job(0.0, work=1e6), 0.0)


def test_what_higher_classes_take_is_not_promised_to_lower_ones() -> None:
    """Realtime has most of the work: a batch request's turn comes as slowly as batch ones really go."""
    loop = run(arrivals("a", 34.0, 1) + (waiting := arrivals("b", 20.0, 2, Priority.BATCH)), wait_s=5.0, aging_s=1000.0)
    waited = [one.ttft_s for one in waiting if one.first_token_at_s is not None]
    assert any(one.refused for one in waiting)
    assert percentile(waited, 0.9) < 2 * 5.0
    assert loop.now_s < 2 * SECONDS


def at_risk(*batch: Job, max_preemptions: int = 2) -> tuple[Scheduler[Job], Job]:
    """One place, held by `batch`, and a realtime request that has waited for most of its SLO."""
    scheduler: Scheduler[Job] = Scheduler(policy(ttft_slo_s=1.0, max_preemptions=max_preemptions), 0.0)
    scheduler.take_room(ClusterRoom(4, 1, places=len(batch)), 0.0)
    for one in batch:
        assert scheduler.arrive(one, 0.0).admitted
        scheduler.first_token(one, 0.1)
    urgent = job(0.1)
    assert not scheduler.arrive(urgent, 0.1).admitted
    return scheduler, urgent


def test_the_youngest_batch_request_is_taken_back_once_the_slo_of_a_realtime_one_is_at_risk() -> None:
    older, younger = job(0.0, priority=Priority.BATCH), job(0.0, priority=Priority.BATCH)
    scheduler, urgent = at_risk(older, younger)
    early = scheduler.step(0.2)
    assert (early.preempted, early.granted) == ([], [])
    late = scheduler.step(1.0)
    assert (late.preempted, late.granted) == ([younger], [urgent])
    assert (younger.stage, younger.preemptions) == (Stage.QUEUED, 1)
    scheduler.end(urgent, 1.5)
    assert scheduler.step(1.5).granted == [younger]


def test_realtime_and_nearline_requests_in_flight_are_left_alone() -> None:
    scheduler, _ = at_risk(job(0.0), job(0.0, priority=Priority.NEARLINE))
    assert scheduler.step(30.0).preempted == []


def test_a_batch_request_is_taken_back_no_more_often_than_allowed() -> None:
    batch = job(0.0, priority=Priority.BATCH)
    scheduler, urgent = at_risk(batch, max_preemptions=1)
    assert scheduler.step(1.0).preempted == [batch]
    scheduler.end(urgent, 1.1)
    assert scheduler.step(1.1).granted == [batch]
    scheduler.arrive(job(1.2), 1.2)
    assert scheduler.step(60.0).preempted == []


actions = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "arrive", "computed", "end", "leave", "step"]),
        st.sampled_from(Priority),
        st.sampled_from("ab"),
        st.integers(0, 30),
        st.floats(0.001, 0.7),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(actions, st.integers(1, 3), st.integers(1, 6))
def test_every_request_is_in_one_place_and_no_room_stays_empty_while_somebody_waits(
    script: list[tuple[str, Priority, str, int, float]], prefill_workers: int, places: int
) -> None:
    scheduler: Scheduler[Job] = Scheduler(policy(each=4, total=8, ttft_slo_s=0.5, aging_s=1.0), 0.0)
    scheduler.take_room(ClusterRoom(prefill_workers, 1, places), 0.0)
    now_s = 0.0
    sent: list[Job] = []
    queued: list[Job] = []
    for name, priority, tenant, place, passed_s in script:
        now_s += passed_s
        if name == "arrive":
            one = job(now_s, tenant, priority)
            try:
                arrival = scheduler.arrive(one, now_s)
            except OverloadedError:
                assert one.stage is Stage.NEW
            else:
                (sent if arrival.admitted else queued).append(one)
                if arrival.dropped is not None:
                    queued.remove(arrival.dropped)
        elif name == "computed" and place < len(sent):
            scheduler.computed(sent[place], now_s)
        elif name == "end" and place < len(sent):
            scheduler.end(sent.pop(place), now_s)
        elif name == "leave" and place < len(queued):
            scheduler.end(queued.pop(place), now_s)
        step = scheduler.step(now_s)
        for one in step.preempted:  # told before the grants: what is taken back may have its turn at once
            if one in sent:
                sent.remove(one)
                queued.append(one)
            else:
                queued = [*queued, one] if one not in queued else queued
        for one in step.granted:
            if one in queued:
                queued.remove(one)
                sent.append(one)
        assert len(scheduler.queues) == len(queued)
        assert scheduler.in_flight.open == len(sent) <= places
        assert all(one.stage is Stage.QUEUED for one in queued)
        assert all(one.stage in (Stage.PREFILL, Stage.DECODE) for one in sent)
        assert len(queued) <= 8 + places
        # Work conserving: whoever waits, waits for something.
        assert not queued or scheduler.in_flight.bottleneck(now_s) is not None
    for one in [*sent, *queued]:
        scheduler.end(one, now_s)
    assert (len(scheduler.queues), scheduler.in_flight.open, scheduler.in_flight.lanes.prompts) == (0, 0, 0)
