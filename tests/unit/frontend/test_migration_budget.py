"""How many requests may move within ten seconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from frontend.migration_budget import WINDOW_S, MigrationBudget


def test_a_third_of_all_open_requests_may_move_at_once() -> None:
    budget = MigrationBudget(1.0, least=16)
    for _ in range(300):
        budget.begun()
    assert all(budget.take(100.0) for _ in range(100))


def test_of_few_requests_some_always_may() -> None:
    budget = MigrationBudget(0.1, least=16)
    budget.begun()
    assert [budget.take(5.0) for _ in range(17)] == [True] * 16 + [False]


def test_a_share_of_nothing_is_nothing() -> None:
    budget = MigrationBudget(0.0, least=0)
    budget.begun()
    assert not budget.take(0.0)


def test_what_moved_is_forgotten_after_the_window() -> None:
    budget = MigrationBudget(1.0, least=1)
    assert budget.take(50.0)
    assert not budget.take(50.0 + WINDOW_S - 1.1)
    assert budget.take(50.0 + WINDOW_S)


@given(st.floats(0.0, 3.0), st.lists(st.tuples(st.floats(0, 3), st.integers(0, 2)), max_size=200))
def test_moves_within_a_window_never_exceed_the_share_of_the_requests_in_it(
    share: float, steps: list[tuple[float, int]]
) -> None:
    budget, now_s = MigrationBudget(share, least=2), 1000.0
    begun_s, ended_s, moved_s = list[float](), list[float](), list[float]()
    for passed_s, what in steps:
        now_s += passed_s
        if what == 0:
            budget.begun()
            begun_s.append(now_s)
        elif what == 1 and len(begun_s) > len(ended_s):
            budget.ended(now_s)
            ended_s.append(now_s)
        elif what == 2 and budget.take(now_s):
            moved_s.append(now_s)
            # The count is in steps of a second, so that it may be one second short of the window.
            lately = sum(one > now_s - WINDOW_S + 1 for one in moved_s)
            there = len(begun_s) - len(ended_s) + sum(one > now_s - WINDOW_S for one in ended_s)
            assert lately <= max(2, share * there)
