"""Laws of the queues: nothing is lost or doubled, tenants share by weight, nothing starves, all is bounded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.admission.claim import Priority
from frontend.admission.class_queues import ClassQueues, QueueLimits
from frontend.admission.fair_queue import FairQueue
from tests.support.admission_loop import Job, job

TENANTS = ("a", "b", "c")
works = st.integers(1, 1000).map(float)
tenants = st.sampled_from(TENANTS)
weights = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 4.0]) for name in TENANTS})


def limits(each: int = 100, total: int = 300, aging_s: float = 10.0) -> QueueLimits:
    return QueueLimits(dict.fromkeys(Priority, each), total, aging_s)


def offer(queues: ClassQueues[Job], one: Job) -> Job | None:
    """Queue it, which must go well; gives who was dropped."""
    one.queued_s = one.arrived_s
    result = queues.offer(one)
    assert result.queued
    return result.dropped


@given(st.lists(st.one_of(st.tuples(tenants, works), st.none(), st.integers(0, 20)), max_size=60))
def test_what_goes_in_comes_out_once_or_was_taken_out(actions: Sequence[tuple[str, float] | int | None]) -> None:
    """A pair queues a request, None takes the next, a number gives up the request of that place."""
    queue: FairQueue[Job] = FairQueue()
    inside: list[Job] = []
    for action in actions:
        if isinstance(action, tuple):
            inside.append(job(0, action[0], work=action[1]))
            queue.add(inside[-1])
        elif action is None and inside:
            expected = queue.peek()
            taken = queue.pop()
            assert taken is expected
            inside.remove(taken)
        elif isinstance(action, int) and action < len(inside):
            queue.remove(inside.pop(action))
        assert len(queue) == len(inside)
        assert queue.work == pytest.approx(sum(one.work for one in inside))
        assert all(one in queue for one in inside)
    assert {queue.pop() for _ in range(len(inside))} == set(inside)


@given(weights, st.lists(st.tuples(tenants, works), min_size=1, max_size=80))
def test_while_two_tenants_wait_their_work_by_weight_differs_by_no_more_than_a_request_of_each(
    weight: dict[str, float], arrivals: list[tuple[str, float]]
) -> None:
    queue: FairQueue[Job] = FairQueue()
    left: Counter[str] = Counter()
    largest: defaultdict[str, float] = defaultdict(float)
    for tenant, work in arrivals:
        queue.add(job(0, tenant, work=work, weight=weight[tenant]))
        left[tenant] += 1
        largest[tenant] = max(largest[tenant], work)
    served: defaultdict[str, float] = defaultdict(float)
    waiting = set(left)
    while len(queue):
        one = queue.pop()
        tenant = one.claim.tenant
        served[tenant] += one.work / weight[tenant]
        left[tenant] -= 1
        if not left[tenant]:
            waiting.discard(tenant)
        for first in waiting:
            for second in waiting - {first}:
                allowed = largest[first] / weight[first] + largest[second] / weight[second]
                assert abs(served[first] - served[second]) <= allowed + 1e-6


@given(st.lists(st.tuples(tenants, works), max_size=30), tenants, works, tenants, works)
def test_the_work_before_a_request_never_shrinks_when_more_is_queued(
    arrivals: list[tuple[str, float]], tenant: str, work: float, other: str, more: float
) -> None:
    queue: FairQueue[Job] = FairQueue()
    for name, size in arrivals:
        queue.add(job(0, name, work=size))
    asking = job(0, tenant, work=work)
    before = queue.work_before(asking)
    assert 0 <= before <= queue.work + 1e-6
    queue.add(job(0, other, work=more))
    assert queue.work_before(asking) >= before - 1e-6


@given(st.lists(st.tuples(tenants, works), min_size=1, max_size=30), tenants, works)
def test_no_more_goes_before_a_request_than_was_predicted(
    arrivals: list[tuple[str, float]], tenant: str, work: float
) -> None:
    queue: FairQueue[Job] = FairQueue()
    for name, size in arrivals:
        queue.add(job(0, name, work=size))
    asking = job(0, tenant, work=work)
    predicted = queue.work_before(asking)
    largest = sum(max((size for name, size in arrivals if name == each), default=0) for each in TENANTS)
    queue.add(asking)
    went_before = 0.0
    while (one := queue.pop()) is not asking:
        went_before += one.work
    assert went_before <= predicted + largest + 1e-6


def test_one_that_gives_up_leaves_its_tenants_turn_to_the_next() -> None:
    queue: FairQueue[Job] = FairQueue()
    first, second, other = job(0, "a", work=10), job(0, "a", work=10), job(0, "b", work=10)
    for one in (first, second, other):
        queue.add(one)
    queue.remove(first)
    assert [queue.pop(), queue.pop()] == [second, other]


def test_one_that_is_put_back_goes_before_the_others_of_its_tenant() -> None:
    queue: FairQueue[Job] = FairQueue()
    waiting, resumed = job(0), job(0)
    queue.add(waiting)
    queue.add(resumed, first=True)
    assert queue.pop() is resumed


def test_tenants_that_never_come_back_are_forgotten() -> None:
    queue: FairQueue[Job] = FairQueue()
    queue.add(job(0, "always", work=1e9))
    for number in range(5000):
        queue.add(job(0, f"tenant-{number}"))
        if number % 2:
            queue.remove(queue.oldest() if queue.oldest().claim.tenant != "always" else queue.peek())
        if len(queue) > 10:
            queue.pop()
    assert len(queue._flows) < 2500


def test_a_higher_class_goes_first() -> None:
    queues: ClassQueues[Job] = ClassQueues(limits())
    jobs = [job(0, priority=one) for one in (Priority.BATCH, Priority.REALTIME, Priority.NEARLINE)]
    for one in jobs:
        offer(queues, one)
    assert [queues.pop(0).claim.priority for _ in jobs] == list(Priority)


def test_a_class_that_has_aged_gets_a_tenth_of_the_work_of_those_above_it() -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(each=1000, total=2000, aging_s=10))
    for _ in range(20):
        offer(queues, job(0, priority=Priority.BATCH))
    for _ in range(200):
        offer(queues, job(0))
    young = [queues.pop(9.9).claim.priority for _ in range(50)]
    aged = [queues.pop(10.0).claim.priority for _ in range(110)]
    assert set(young) == {Priority.REALTIME}
    assert aged.count(Priority.BATCH) == 10


@given(st.lists(works, min_size=1, max_size=5), st.integers(200, 1000).map(float))
def test_batch_does_not_starve_however_much_realtime_comes(batch: list[float], realtime: float) -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(aging_s=1))
    for work in batch:
        offer(queues, job(0, priority=Priority.BATCH, work=work))
    left, work_above = len(batch), 0.0
    while left:
        offer(queues, job(5, work=realtime))  # there is always one
        one = queues.pop(5)
        if one.claim.priority is Priority.BATCH:
            left -= 1
        else:
            work_above += one.work
    assert work_above <= 10 * sum(batch) + (len(batch) + 1) * realtime


def test_a_full_class_refuses_the_tenant_that_fills_it() -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(each=3))
    for _ in range(3):
        offer(queues, job(0, "flood"))
    assert not queues.offer(job(0, "flood")).queued


def test_a_full_class_drops_the_youngest_of_the_tenant_that_fills_it_for_another_tenant() -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(each=3))
    flood = [job(0, "flood") for _ in range(3)]
    for one in flood:
        offer(queues, one)
    assert offer(queues, job(0, "other")) is flood[-1]
    assert len(queues) == 3


def test_a_tenant_with_weight_may_hold_more_of_the_queue() -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(each=3))
    for _ in range(3):
        offer(queues, job(0, "heavy", weight=4.0))
    assert not queues.offer(job(0, "light")).queued


def test_in_a_full_queue_realtime_drops_the_youngest_batch_request_and_batch_drops_nothing() -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(total=4))
    batch = [job(0, priority=Priority.BATCH) for _ in range(2)]
    nearline = [job(0, priority=Priority.NEARLINE) for _ in range(2)]
    for one in batch + nearline:
        offer(queues, one)
    dropped = [offer(queues, job(0)) for _ in range(4)]
    assert dropped == [batch[1], batch[0], nearline[1], nearline[0]]
    assert not queues.offer(job(0, priority=Priority.BATCH)).queued
    assert not queues.offer(job(0)).queued


def test_an_answer_that_has_begun_is_not_dropped() -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(total=1))
    begun = job(0, priority=Priority.BATCH)
    begun.tokens = 3
    queues.put_back(begun)
    assert not queues.offer(job(0)).queued


@given(st.lists(st.tuples(st.sampled_from(Priority), tenants, works, st.booleans()), max_size=80))
def test_the_queues_never_hold_more_than_their_limits(
    actions: list[tuple[Priority, str, float, bool]],
) -> None:
    queues: ClassQueues[Job] = ClassQueues(limits(each=5, total=9))
    inside: set[Job] = set()
    for priority, tenant, work, take in actions:
        if take and inside:
            inside.remove(queues.pop(0))
            continue
        one = job(0, tenant, priority, work=work)
        result = queues.offer(one)
        if result.queued:
            inside.add(one)
        else:
            assert result.dropped is None
        if result.dropped is not None:
            inside.remove(result.dropped)
            assert result.dropped.claim.priority >= priority
        assert len(queues) == len(inside) <= 9
        assert all(len(queues.of(each)) <= 5 for each in Priority)
