"""What a frontend believes of its workers, as sets arrive and calls fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.cluster_view import FIRST_PENALTY_S, MAX_PENALTY_S, ClusterView
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerSet, WorkerState


def a_worker(worker_id: str, epoch: int = 1, renewals: int = 1, state: str = "READY") -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        role=Role.ROLE_DECODE,
        state=WorkerState.Value(state),
        epoch=epoch,
        renewals=renewals,
    )


def a_set(*workers: WorkerRecord, registry: str = "r1", settled: bool = True) -> WorkerSet:
    return WorkerSet(workers=workers, registry_id=registry, settled=settled, lease_s=6)


def ids(view: ClusterView) -> set[str]:
    return {record.worker_id for record in view.records()}


@pytest.fixture
def view() -> ClusterView:
    view = ClusterView()
    view.apply(a_set(a_worker("a"), a_worker("b")))
    return view


def test_workers_that_a_restarted_registry_has_not_heard_of_yet_are_kept(view: ClusterView) -> None:
    view.apply(a_set(registry="r2", settled=False))
    assert ids(view) == {"a", "b"}
    view.apply(a_set(a_worker("b", renewals=9), a_worker("c"), registry="r2", settled=False))
    assert ids(view) == {"a", "b", "c"}
    assert {record.renewals for record in view.records() if record.worker_id == "b"} == {9}


def test_they_are_dropped_once_it_settled_without_them(view: ClusterView) -> None:
    view.apply(a_set(a_worker("b"), registry="r2", settled=False))
    view.apply(a_set(a_worker("b"), registry="r2"))
    assert ids(view) == {"b"}


def test_a_worker_that_left_a_registry_which_knew_it_is_dropped_before_it_settles(view: ClusterView) -> None:
    view.apply(a_set(a_worker("a"), a_worker("b"), registry="r2", settled=False))
    view.apply(a_set(a_worker("b"), registry="r2", settled=False))
    assert ids(view) == {"b"}


def test_a_settled_registry_is_believed_at_once(view: ClusterView) -> None:
    view.apply(a_set(a_worker("c")))
    assert ids(view) == {"c"}


worker_sets = st.lists(
    st.builds(
        lambda ids, registry, settled: a_set(*map(a_worker, sorted(ids)), registry=registry, settled=settled),
        st.sets(st.sampled_from("abcd")),
        st.sampled_from(["r1", "r2"]),
        st.booleans(),
    ),
    min_size=1,
)


@given(worker_sets)
def test_the_view_always_holds_what_the_newest_set_lists_and_equals_it_when_settled(sets: list[WorkerSet]) -> None:
    view = ClusterView()
    for workers in sets:
        view.apply(workers)
        listed = {record.worker_id for record in workers.workers}
        assert listed <= ids(view)
        if workers.settled:
            assert ids(view) == listed


@given(st.integers(1, 5), st.integers(1, 5))
def test_while_unsettled_an_older_incarnation_never_replaces_a_newer_one(first: int, second: int) -> None:
    view = ClusterView()
    view.apply(a_set(a_worker("a", first)))
    view.apply(a_set(a_worker("a", second), registry="r2", settled=False))
    assert view.records()[0].epoch == max(first, second)


def test_a_worker_whose_call_failed_is_avoided_for_a_while(view: ClusterView) -> None:
    view.suspect("a", 1, now_s=100)
    assert [record.worker_id for record in view.ready(Role.ROLE_DECODE, 100)] == ["b"]
    assert view.is_suspect("a", 100 + FIRST_PENALTY_S - 0.1)
    assert not view.is_suspect("a", 100 + FIRST_PENALTY_S)


def test_only_a_renewal_sent_after_the_failure_proves_life(view: ClusterView) -> None:
    view.suspect("a", 1, now_s=100)
    view.apply(a_set(a_worker("a", renewals=2)))
    assert view.is_suspect("a", 100.1), "this one may have been on its way"
    view.apply(a_set(a_worker("a", renewals=3)))
    assert not view.is_suspect("a", 100.1)


def test_a_new_incarnation_is_not_suspect(view: ClusterView) -> None:
    view.suspect("a", 1, now_s=100)
    view.apply(a_set(a_worker("a", epoch=2)))
    assert not view.is_suspect("a", 100.1)
    view.suspect("a", 1, now_s=100.2)
    assert not view.is_suspect("a", 100.2), "the failure was the old incarnation's"


def test_a_worker_that_renews_but_keeps_failing_is_avoided_longer_each_time(view: ClusterView) -> None:
    now_s, renewals, penalties_s = 0.0, 1, []
    for _ in range(6):
        view.suspect("a", 1, now_s)
        began_s = now_s
        while view.is_suspect("a", now_s):
            now_s += 0.5
            renewals += 1
            view.apply(a_set(a_worker("a", renewals=renewals)))
        penalties_s.append(now_s - began_s)
    assert penalties_s == sorted(penalties_s)
    assert penalties_s[1] == 2 * FIRST_PENALTY_S
    assert penalties_s[-1] == MAX_PENALTY_S
    view.absolve("a")
    view.suspect("a", 1, now_s)
    assert not view.is_suspect("a", now_s + FIRST_PENALTY_S)


def test_calls_that_fail_together_count_once(view: ClusterView) -> None:
    for _ in range(50):
        view.suspect("a", 1, now_s=100)
    assert not view.is_suspect("a", 100 + FIRST_PENALTY_S)


@pytest.mark.parametrize("state", ["STARTING", "DRAINING"])
def test_only_ready_workers_are_ready(state: str) -> None:
    view = ClusterView()
    view.apply(a_set(a_worker("a", state=state)))
    assert view.ready(Role.ROLE_DECODE, 0) == []
    assert ids(view) == {"a"}
