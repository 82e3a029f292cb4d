"""When an engine counts as standing still."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.step_watch import MOST_BETWEEN_LOOKS_S, Stall, StepWatch


def watch() -> StepWatch:
    return StepWatch(silence_s=20.0, hang_s=120.0, token_s=0.05)


def seconds(watch: StepWatch, begin_s: int, end_s: int, *, steps: int = 7, tokens: int = 0, busy: bool = True) -> Stall:
    """A look each second; the last one's verdict."""
    verdict = Stall.NONE
    for now_s in range(begin_s, end_s + 1):
        verdict = watch.look(steps, tokens, busy=busy, now_s=float(now_s))
    return verdict


def test_an_engine_with_requests_and_no_step_is_silent_and_later_hung() -> None:
    one = watch()
    assert seconds(one, 0, 19) is Stall.NONE
    assert seconds(one, 20, 20) is Stall.SILENT
    assert seconds(one, 21, 119) is Stall.SILENT
    assert seconds(one, 120, 120) is Stall.HUNG


def test_an_idle_engine_takes_no_steps_and_is_well() -> None:
    assert seconds(watch(), 0, 500, busy=False) is Stall.NONE


def test_a_step_ends_the_silence() -> None:
    one = watch()
    assert seconds(one, 0, 30) is Stall.SILENT
    assert seconds(one, 31, 31, steps=8) is Stall.NONE
    assert seconds(one, 32, 50, steps=8) is Stall.NONE


def test_a_silent_engine_whose_requests_have_left_it_stays_silent_until_it_takes_a_step() -> None:
    one = watch()
    assert seconds(one, 0, 20) is Stall.SILENT
    assert seconds(one, 21, 119, busy=False) is Stall.SILENT
    assert seconds(one, 120, 120, busy=False) is Stall.HUNG


def test_requests_that_give_up_on_a_frozen_engine_do_not_make_it_well() -> None:
    one = watch()
    assert seconds(one, 0, 12) is Stall.NONE
    assert seconds(one, 13, 30, busy=False) is Stall.NONE
    assert seconds(one, 31, 39) is Stall.SILENT


def test_a_large_step_may_take_its_time() -> None:
    one = watch()
    assert seconds(one, 0, 20 + 99, tokens=2000) is Stall.NONE
    assert seconds(one, 120, 120, tokens=2000) is Stall.SILENT


@given(st.floats(0, 10_000))
def test_a_service_that_stood_still_itself_does_not_blame_its_engine(stopped_s: float) -> None:
    one = watch()
    seconds(one, 0, 10)
    assert one.look(7, 0, busy=True, now_s=10.0 + stopped_s) is Stall.NONE
    assert one.silent_s <= 10.0 + MOST_BETWEEN_LOOKS_S


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 5))))
def test_nobody_is_blamed_who_takes_a_step_between_any_two_looks(looks: list[tuple[int, bool, float]]) -> None:
    one, steps, now_s = watch(), 0, 0.0
    for tokens, busy, passed_s in looks:
        steps, now_s = steps + 1, now_s + passed_s
        assert one.look(steps, tokens, busy=busy, now_s=now_s) is Stall.NONE
