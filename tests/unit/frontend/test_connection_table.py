"""Which connections may stay when there are too many of them."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from frontend.connection_table import ConnectionTable, Verdict


@dataclass(frozen=True, eq=False)
class Connection:
    address: str = "10.0.0.1"


def test_the_one_idle_longest_makes_room() -> None:
    table = ConnectionTable[Connection](most=3, most_per_address=3)
    first, second, third = (Connection() for _ in range(3))
    for one in (first, second, third):
        assert table.open(one) == (Verdict.WELCOME, None)
    table.busy(first)
    assert table.open(Connection()) == (Verdict.WELCOME, second)
    table.idle(first)
    assert table.open(Connection()) == (Verdict.WELCOME, third)


def test_where_none_is_idle_the_new_one_goes() -> None:
    table = ConnectionTable[Connection](most=1, most_per_address=1)
    only = Connection()
    table.open(only)
    table.busy(only)
    assert table.open(Connection()) == (Verdict.TOO_MANY_OF_ADDRESS, None)
    assert table.open(Connection("10.0.0.2")) == (Verdict.TOO_MANY, None)


def test_an_address_with_too_many_loses_its_own_and_nobody_elses() -> None:
    table = ConnectionTable[Connection](most=10, most_per_address=2)
    other, first, second = Connection("10.0.0.2"), Connection(), Connection()
    for one in (other, first, second):
        table.open(one)
    assert table.open(Connection()) == (Verdict.WELCOME, first)


@given(st.lists(st.tuples(st.sampled_from(["open", "busy", "idle", "close"]), st.integers(0, 5)), max_size=60))
def test_no_order_of_events_loses_count(events: list[tuple[str, int]]) -> None:
    table = ConnectionTable[Connection](most=4, most_per_address=2)
    known: list[Connection] = []
    for what, number in events:
        if what == "open":
            new = Connection(f"10.0.0.{number % 3}")
            verdict, evicted = table.open(new)
            if evicted is not None:
                known.remove(evicted)
            if verdict is Verdict.WELCOME:
                known.append(new)
        elif known:
            one = known[number % len(known)]
            getattr(table, what)(one)
            if what == "close":
                known.remove(one)
        assert table.count == len(known) <= 4
        assert all(sum(one.address == each.address for each in known) <= 2 for one in known)
    for one in known:
        table.close(one)
    assert table.count == 0
