"""Laws of the buckets: never more than the limit, and a time to come back that is true."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.admission.claim import Priority
from frontend.keys.bucket import Rate, charged, given_back, level, room_in_s
from frontend.keys.keyring import Key, Rates
from frontend.keys.ledger import Ledger, LimitError, Spending

rates = st.builds(Rate, st.floats(0.01, 1e5), st.floats(1, 1e6))
starts = st.floats(0, 1e7)


@given(rates, starts, st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 2e6)), max_size=60))
def test_in_no_window_more_is_charged_than_the_capacity_and_what_fills_in(
    rate: Rate, start_s: float, asked: list[tuple[float, float]]
) -> None:
    now_s, full_at_s = start_s, 0.0
    had: list[tuple[float, float]] = []
    for pause_s, amount in asked:
        now_s += pause_s
        if amount <= rate.capacity and not room_in_s(rate, full_at_s, amount, now_s):
            full_at_s = charged(rate, full_at_s, amount, now_s)
            had.append((now_s, amount))
    for first, (from_s, _) in enumerate(had):
        total = 0.0
        for to_s, amount in had[first:]:
            total += amount
            most = rate.capacity + rate.per_s * (to_s - from_s)
            assert total <= most * (1 + 1e-5) + 1, "the slack, once, and what floats lose"


@given(rates, starts, st.floats(0, 2e6), st.floats(0.1, 2e6), st.floats(0, 1), st.floats(0, 100))
def test_there_is_room_after_the_time_that_was_told(
    rate: Rate, now_s: float, debt: float, amount: float, held_share: float, held_ago_s: float
) -> None:
    full_at_s = charged(rate, 0.0, debt, now_s)
    held = held_share * max(0.0, level(rate, full_at_s, now_s))  # no more is ever held than there is
    wait_s = room_in_s(rate, full_at_s, amount, now_s, held=held, last_held_s=now_s - held_ago_s)
    then_s = now_s + wait_s
    if held and wait_s >= now_s - held_ago_s + rate.fills_in_s - now_s:
        lapsed_s = max(now_s, now_s - held_ago_s + rate.fills_in_s)  # what was held for so long is charged by then
        full_at_s, held = charged(rate, full_at_s, held, lapsed_s), 0.0
    # Clocks are read with a grain.
    grain_s = 1e-6 * max(1.0, wait_s) + 1e-8 * now_s
    assert room_in_s(rate, full_at_s, amount, then_s + grain_s, held=held, last_held_s=now_s - held_ago_s) == 0


def test_what_was_for_nothing_is_given_back_less_what_refilled_meanwhile() -> None:
    rate = Rate(per_s=10, capacity=100)
    full_at_s = charged(rate, 0.0, 80, 50.0)
    assert level(rate, full_at_s, 50.0) == 20
    assert level(rate, given_back(rate, full_at_s, 80, 50.0, 53.0), 53.0) == 100
    assert given_back(rate, full_at_s, 80, 50.0, 100.0) == full_at_s, "all has refilled: nothing is left to give back"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def key(rates: Rates, name: str = "k") -> Key:
    return Key(name, bytes(32), "acme", name, classes=tuple(Priority), rates=rates)


@dataclass
class Running:
    spending: Spending
    most: int


@given(
    st.integers(1, 50),
    st.integers(10, 5000),
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.floats(0, 20), st.integers(1, 400)),
            st.tuples(st.just("end"), st.floats(0, 20), st.integers(0, 400)),
        ),
        max_size=60,
    ),
)
def test_no_more_output_is_had_than_the_limit_whatever_requests_hold_and_when_they_end(
    per_s: int, capacity: int, events: list[tuple[str, float, int]]
) -> None:
    rate, clock = Rate(per_s, capacity), Clock()
    ledger, own = Ledger(clock=clock), key(Rates(output_tokens=rate))
    running: list[Running] = []
    had: list[tuple[float, int]] = []
    for what, pause_s, amount in events:
        clock.now_s += pause_s
        if what == "ask" and amount <= capacity:
            spending = ledger.enter(own)
            refusal = refused(spending, amount)
            if refusal is None:
                running.append(Running(spending, amount))
                continue
            with spending:
                pass
            assert refused_after(ledger, own, clock, refusal.retry_after_s or 0, amount) is None, "it was told so"
        elif running:
            one = running.pop(0)
            used = min(amount, one.most)
            one.spending.settle(used)
            with one.spending:
                pass
            had.append((clock.now_s, used))
    for first, (from_s, _) in enumerate(had):
        total = 0
        for to_s, used in had[first:]:
            total += used
            # What lapsed while it ran was charged before its end: at most the capacity, once.
            assert total <= 2 * capacity + per_s * (to_s - from_s) + 1


def refused(spending: Spending, amount: int) -> LimitError | None:
    try:
        spending.charge(1, amount)
    except LimitError as error:
        return error
    return None


def refused_after(ledger: Ledger, own: Key, clock: Clock, wait_s: float, amount: int) -> LimitError | None:
    """Why the request is refused at that time if nobody else came. Leaves all as it was."""
    account = ledger.account(own.account)
    row, holds, before_s = list(account.row), list(account.holds), clock.now_s
    clock.now_s += wait_s
    refusal = refused(ledger.enter(own), amount)
    clock.now_s = before_s
    for place, value in enumerate(row):
        account.row[place] = value
    account.holds.clear()
    account.holds.extend(holds)
    for one in holds:
        one.lapsed = False
    return refusal


def test_a_request_is_charged_as_a_whole_or_not_at_all() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock)
    own = key(Rates(Rate(1, 10), Rate(10, 100), Rate(10, 100)))
    ledger.enter(own).charge(10, 1000)
    with ledger.enter(own) as spending, pytest.raises(LimitError) as caught:
        spending.charge(10, 10)
    assert caught.value.reason == "output_tokens"
    left = {name: left for name, _, left, _ in ledger.left(own)}
    assert left == {"requests": 9, "input-tokens": 90, "output-tokens": 0}, "only the first was counted"


def test_what_the_answer_did_not_need_is_there_again_at_its_end() -> None:
    clock = Clock()
    ledger, own = Ledger(clock=clock), key(Rates(output_tokens=Rate(1, 100)))
    spending = ledger.enter(own)
    spending.charge(1, 80)
    assert ledger.left(own)[0][2] == 20
    spending.settle(5)
    with spending:
        pass
    assert ledger.left(own)[0][2] == 95


def test_more_than_was_held_is_a_debt_that_the_next_one_waits_for() -> None:
    clock = Clock()
    ledger, own = Ledger(clock=clock), key(Rates(output_tokens=Rate(1, 100)))
    with ledger.enter(own) as spending:
        spending.charge(1, 50)
        spending.settle(130)
    with ledger.enter(own) as late, pytest.raises(LimitError) as caught:
        late.charge(1, 10)
    assert caught.value.retry_after_s == 40.0


def test_what_the_service_is_to_blame_for_does_not_count() -> None:
    clock = Clock()
    ledger, own = Ledger(clock=clock), key(Rates(Rate(1, 10), Rate(10, 100), Rate(10, 100)))
    with ledger.enter(own) as spending:
        spending.charge(60, 10)
        spending.settle(0, void=True)
    assert [left for _, _, left, _ in ledger.left(own)] == [10, 100, 100]


def test_streams_are_counted_while_they_run() -> None:
    ledger, own = Ledger(clock=Clock()), key(Rates(streams=2))
    first, second = ledger.enter(own), ledger.enter(own)
    with pytest.raises(LimitError, match="2 requests at the same time"):
        ledger.enter(own)
    with first:
        pass
    with ledger.enter(own), second:
        pass
