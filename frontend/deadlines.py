"""Many deadlines by one timer: each message of each request moves one, and a timer for each would cost more than it.

Moving a deadline is an assignment. The timer stands at the earliest that was known when it was set; when it goes off,
whoever is late is told, and the rest is looked through for the next earliest. Nearly all have moved on by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

NEVER_S = float("inf")


class Waiting(Protocol):
    """Somebody who waits for something, until `due_s`."""

    due_s: float

    def expired(self) -> None:
        """It is `due_s`. Told once for each deadline that passes."""
        ...


class Deadlines:
    """Those of one event loop.

    Args:
        clock: what `due_s` is a time of.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[Waiting, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = NEVER_S

    def set(self, one: Waiting, due_s: float) -> None:
        """Expect something from now on, or by another time than before."""
        one.due_s = due_s
        self._waiting[one] = None
        if due_s < self._timer_s:
            self._look_at(due_s)

    def drop(self, one: Waiting) -> None:
        """Expect nothing any more."""
        one.due_s = NEVER_S
        self._waiting.pop(one, None)
        if not self._waiting:
            self._stop()

    def _look_at(self, at_s: float) -> None:
        self._stop()
        self._timer_s = at_s
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at_s - self._clock()), self._look)

    def _look(self) -> None:
        self._timer, self._timer_s, now_s = None, NEVER_S, self._clock()
        late = [one for one in self._waiting if one.due_s <= now_s]
        for one in late:
            if one.due_s <= now_s:  # not dropped by one of the others
                one.due_s = NEVER_S
                one.expired()
        next_s = min((one.due_s for one in self._waiting), default=NEVER_S)
        if next_s < NEVER_S:
            self._look_at(next_s)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_s = None, NEVER_S
