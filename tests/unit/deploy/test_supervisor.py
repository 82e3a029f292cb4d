"""When a process that died is started again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploy.supervisor import RestartPolicy


def test_the_wait_doubles_up_to_its_limit_and_then_it_is_given_up() -> None:
    policy = RestartPolicy(limit=6, window_s=600, first_delay_s=1, max_delay_s=10)
    restarts_s: list[float] = []
    delays_s = []
    while (delay_s := policy.delay_s(restarts_s, now_s=0.0)) is not None:
        delays_s.append(delay_s)
        restarts_s.append(0.0)
    assert delays_s == [1, 2, 4, 8, 10, 10]


def test_restarts_of_long_ago_do_not_count() -> None:
    policy = RestartPolicy(limit=1, window_s=600)
    assert policy.delay_s([0.0], now_s=599.0) is None
    assert policy.delay_s([0.0], now_s=600.0) == policy.first_delay_s


@given(st.lists(st.floats(0, 10_000), max_size=50), st.integers(0, 10))
def test_within_any_window_there_are_never_more_restarts_than_the_limit(deaths_s: list[float], limit: int) -> None:
    policy = RestartPolicy(limit=limit, window_s=600)
    restarts_s: list[float] = []
    for death_s in sorted(deaths_s):
        if policy.delay_s(restarts_s, death_s) is not None:
            restarts_s.append(death_s)
    for start_s in restarts_s:
        assert sum(1 for restart_s in restarts_s if start_s <= restart_s < start_s + policy.window_s) <= limit
