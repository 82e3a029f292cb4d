"""When a cluster's frontend is left alone, and how it comes back."""

from __future__ import annotations

from frontend.clusters.breaker import FAILURES_TO_OPEN, FIRST_OPEN_S, MAX_OPEN_S, Breaker, Health


def test_errors_one_after_the_other_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(0.0, unreachable=False)
    breaker.succeeded()
    breaker.failed(0.0, unreachable=False)
    assert breaker.health(0.0) is Health.UP
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(0.0, unreachable=False)
    assert breaker.health(0.0) is Health.DOWN


def test_one_that_nobody_answers_at_is_left_alone_at_once_then_probed_by_one_request_at_a_time() -> None:
    breaker = Breaker()
    breaker.failed(0.0, unreachable=True)
    assert breaker.health(FIRST_OPEN_S / 2) is Health.DOWN
    assert breaker.health(FIRST_OPEN_S) is Health.PROBE
    breaker.probing += 1
    assert breaker.health(FIRST_OPEN_S) is Health.DOWN
    breaker.probing -= 1
    breaker.succeeded()
    assert breaker.health(FIRST_OPEN_S) is Health.UP


def test_requests_that_fail_together_count_once_and_each_failed_probe_doubles_the_pause() -> None:
    breaker, now_s = Breaker(), 0.0
    pauses = []
    for _ in range(8):
        for _ in range(5):
            breaker.failed(now_s, unreachable=True)
        pauses.append(breaker.open_until_s - now_s)
        now_s = breaker.open_until_s
    assert pauses[:4] == [FIRST_OPEN_S, 2 * FIRST_OPEN_S, 4 * FIRST_OPEN_S, 8 * FIRST_OPEN_S]
    assert pauses[-1] == MAX_OPEN_S
