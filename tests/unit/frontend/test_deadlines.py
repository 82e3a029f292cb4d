"""Many deadlines by one timer."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from frontend.deadlines import NEVER_S, Deadlines
from tests.support.scripted_worker import until


@dataclass(eq=False)
class Waiter:
    due_s: float = NEVER_S
    told: int = 0

    def expired(self) -> None:
        self.told += 1


async def test_whoever_is_late_is_told_once_and_nobody_else() -> None:
    deadlines, late, later = Deadlines(time.monotonic), Waiter(), Waiter()
    deadlines.set(later, time.monotonic() + 30)
    deadlines.set(late, time.monotonic() + 0.02)
    await until(lambda: late.told)
    await asyncio.sleep(0.03)
    assert (late.told, later.told) == (1, 0)
    deadlines.drop(late)
    deadlines.drop(later)


async def test_a_deadline_that_was_moved_or_dropped_does_not_pass() -> None:
    deadlines, moved, dropped, last = Deadlines(time.monotonic), Waiter(), Waiter(), Waiter()
    for one in (moved, dropped):
        deadlines.set(one, time.monotonic() + 0.01)
    deadlines.set(last, time.monotonic() + 0.05)
    deadlines.set(moved, time.monotonic() + 30)
    deadlines.drop(dropped)
    await until(lambda: last.told)
    assert (moved.told, dropped.told) == (0, 0)
    deadlines.drop(moved)


async def test_one_that_is_set_earlier_than_all_others_passes_in_its_time() -> None:
    deadlines, first, other = Deadlines(time.monotonic), Waiter(), Waiter()
    deadlines.set(other, time.monotonic() + 30)
    deadlines.set(first, time.monotonic() + 30)
    deadlines.set(first, time.monotonic() + 0.01)
    await until(lambda: first.told)
    deadlines.drop(other)
    assert other.told == 0


async def test_what_expires_may_drop_others() -> None:
    deadlines, other = Deadlines(time.monotonic), Waiter()

    class Dropping(Waiter):
        def expired(self) -> None:
            super().expired()
            deadlines.drop(other)
            deadlines.drop(self)

    first = Dropping()
    for one in (first, other):
        deadlines.set(one, time.monotonic() + 0.01)
    await until(lambda: first.told)
    await asyncio.sleep(0.02)
    assert other.told == 0
