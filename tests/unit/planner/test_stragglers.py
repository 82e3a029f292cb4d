"""Who falls behind: by factors over profiles, against the median of its peers, for long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.stragglers import FORGET_S, SpeedBook
from slipstream.v1.planner_pb2 import WorkerSpeed
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState
from slipstream.worker_settings import HealthSettings

LIMITS = HealthSettings(slow_factor=1.5, slow_for_s=120.0)


def workers(count: int, role: Role.ValueType = Role.ROLE_DECODE) -> list[WorkerRecord]:
    return [
        WorkerRecord(worker_id=f"w{number}", epoch=1, role=role, model="m", state=WorkerState.READY)
        for number in range(count)
    ]


def speeds(factors: list[float], *, samples: int = 5, role: Role.ValueType = Role.ROLE_DECODE) -> list[WorkerSpeed]:
    decode = role == Role.ROLE_DECODE
    return [
        WorkerSpeed(
            worker_id=f"w{number}",
            epoch=1,
            step_factor=factor if decode else 0.0,
            prompt_factor=0.0 if decode else factor,
            samples=samples,
        )
        for number, factor in enumerate(factors)
    ]


def after(factors: list[float], seconds: float, book: SpeedBook | None = None, begin_s: float = 0.0) -> set[str]:
    """Who is slow after this was seen for so long, each five seconds."""
    book, slow = book or SpeedBook(LIMITS), set[str]()
    for tick in range(int(seconds / 5) + 1):
        now_s = begin_s + 5.0 * tick
        book.take("f", speeds(factors), now_s)
        slow = set(book.judge(workers(len(factors)), now_s))
    return slow


def test_one_that_takes_twice_as_long_is_slow_once_it_lasted() -> None:
    assert after([1.0, 1.1, 0.9, 2.0], 115) == set()
    assert after([1.0, 1.1, 0.9, 2.0], 120) == {"w3"}


def test_all_that_are_slower_than_their_profile_are_no_stragglers() -> None:
    assert after([3.0, 3.1, 2.9, 3.0], 600) == set()


def test_where_peers_differ_much_by_themselves_more_is_needed() -> None:
    assert after([1.0, 2.0, 0.5, 1.8], 600) == set()


@pytest.mark.parametrize("count", [1, 2])
def test_of_two_nobody_knows_which_is_the_odd_one(count: int) -> None:
    assert after([5.0, 1.0][:count], 600) == set()


def test_prefill_workers_are_judged_by_prompts() -> None:
    book, role = SpeedBook(LIMITS), Role.ROLE_PREFILL
    for tick in range(30):
        book.take("f", speeds([1.0, 1.0, 4.0], role=role), 5.0 * tick)
        slow = book.judge(workers(3, role), 5.0 * tick)
    assert set(slow) == {"w2"}
    assert "4.0 times as long" in slow["w2"]


def test_a_break_begins_the_time_anew() -> None:
    book = SpeedBook(LIMITS)
    after([1.0, 1.0, 1.0, 2.0], 100, book)
    assert after([1.0, 1.0, 1.0, 1.0], 10, book, 105.0) == set()
    assert after([1.0, 1.0, 1.0, 2.0], 60, book, 120.0) == set()


def test_one_that_is_seen_no_more_is_given_another_chance_in_time() -> None:
    book = SpeedBook(LIMITS)
    assert after([1.0, 1.0, 1.0, 2.0], 120, book) == {"w3"}
    assert set(book.judge(workers(4), 300.0)) == {"w3"}, "fenced: nothing new is seen of it"
    assert book.judge(workers(4), 120.0 + FORGET_S) == {}


def test_without_new_samples_and_of_other_incarnations_nothing_is_believed() -> None:
    book = SpeedBook(LIMITS)
    for tick in range(60):
        book.take("f", speeds([1.0, 1.0, 1.0, 9.0], samples=0), 5.0 * tick)
        book.take("g", [WorkerSpeed(worker_id="w3", epoch=7, step_factor=9.0, samples=1)], 5.0 * tick)
        assert book.judge(workers(4), 5.0 * tick) == {}


def test_what_is_out_of_all_bounds_is_left_out() -> None:
    book = SpeedBook(LIMITS)
    for factor in (float("nan"), float("inf"), -1.0, 1e9):
        book.take("f", [WorkerSpeed(worker_id="w0", epoch=1, step_factor=factor, samples=1)], 0.0)
    assert book.judge(workers(4), 0.0) == {}


@given(st.lists(st.floats(0.9, 1.1), min_size=3, max_size=9), st.floats(0.1, 10.0))
def test_a_pool_of_equals_has_no_straggler_however_fast_it_is(factors: list[float], pace: float) -> None:
    assert after([pace * factor for factor in factors], 130) == set()


@given(st.lists(st.floats(0.95, 1.05), min_size=4, max_size=9), st.floats(2.0, 20.0))
def test_one_among_equals_that_is_far_behind_is_found_alone(factors: list[float], slowness: float) -> None:
    assert after([*factors, slowness], 130) == {f"w{len(factors)}"}
