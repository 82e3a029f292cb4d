"""When refused clients may come back: each is given a time of its own, and whoever keeps it is let in then. Pure.

Times are given out along a line, at nearly the pace at which the queue moves, so that those who come back do not
all come at once. The line moves on by as much of a request as is expected to come back at all, which is learned for
each length of wait: who is told to wait for ten minutes mostly does not. A place in the line holds no capacity. New
requests take whatever room there is, and those who keep their time are let in beyond it.

A client is known again by its request: same tenant, same class, same prompt (`Entry.key`). Nothing has to be sent back.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from frontend.admission.claim import Claim, Entry

GRACE_S = 15.0
"""So long after its time a client still is let in."""

EARLY_S = 1.0
"""And so long before it: clocks and whole seconds."""

LINE_SHARE = 0.9
"""Of the pace of the queue, what is promised to those who come back."""

LONGEST_WAIT_S = 60.0
"""OpenAI's clients come back by themselves after a Retry-After of up to so much, and do not wait for longer."""

FIRST_RETURNING, FIRST_LATE_RETURNING = 0.8, 0.1
"""Share of clients that are expected to come back after a wait up to that and beyond, before it is known."""

LEARNING = 0.05
MOST = 16384
"""Appointments that are remembered; beyond it clients are told a time and are nobody special then."""

MAX_PLACES = 16
"""Requests with one key that have one appointment: the answers of an `n`, or clients with the very same prompt."""


@dataclass(slots=True)
class _Appointment:
    due_s: float
    wait_s: float  # that was told
    places: int = 1
    came: bool = False


class Appointments:
    """Of one gate. `now_s` never goes backwards."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], float] = {}
        self._by_key: dict[int, _Appointment] = {}
        self._by_end: list[tuple[float, int]] = []
        self._returning: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def give(self, entry: Entry, earliest_s: float, took_s: float, now_s: float) -> float:
        """Seconds after which the client of a refused request shall come back.

        Args:
            earliest_s: seconds in which there could be room, were nobody else to come back.
            took_s: seconds of the queue's pace that the request is worth.
        """
        self._tidy(now_s)
        key = entry.key()
        known = self._by_key.get(key)
        if known is not None and now_s < known.due_s - EARLY_S:
            known.places = min(known.places + 1, MAX_PLACES)  # it came before its time, which stays
            return known.due_s - now_s
        if known is not None:
            self._came(known)
        whose = _whose(entry.claim)
        due_s = max(now_s + earliest_s, self._lines.get(whose, 0.0))
        wait_s = due_s - now_s
        self._lines[whose] = due_s + took_s * self._expected(wait_s) / LINE_SHARE
        if known is not None:
            known.due_s, known.wait_s, known.came = due_s, wait_s, False
            heapq.heappush(self._by_end, (due_s + GRACE_S, key))
        elif len(self._by_key) < MOST:
            self._by_key[key] = _Appointment(due_s, wait_s)
            heapq.heappush(self._by_end, (due_s + GRACE_S, key))
        return wait_s

    def is_due(self, entry: Entry, now_s: float) -> bool:
        """Whether this is a client that was told to come now."""
        if not self._by_key:
            return False
        self._tidy(now_s)
        one = self._by_key.get(entry.key())
        return one is not None and one.places > 0 and one.due_s - EARLY_S <= now_s <= one.due_s + GRACE_S

    def kept(self, entry: Entry, now_s: float) -> None:
        """It came, and was let in."""
        one = self._by_key[entry.key()]
        one.places -= 1
        self._came(one)

    def no_queue(self, claim: Claim) -> None:
        """Nobody waits: the next one that is refused need not come after those before it."""
        self._lines.pop(_whose(claim), None)

    def _came(self, one: _Appointment) -> None:
        if not one.came:
            one.came = True
            self._learn(one.wait_s, 1.0)

    def _tidy(self, now_s: float) -> None:
        while self._by_end and self._by_end[0][0] < now_s:
            _, key = heapq.heappop(self._by_end)
            one = self._by_key.get(key)
            if one is not None and one.due_s + GRACE_S < now_s:
                del self._by_key[key]
                if not one.came:
                    self._learn(one.wait_s, 0.0)
        if len(self._lines) > MOST:
            self._lines = {whose: at_s for whose, at_s in self._lines.items() if at_s > now_s}

    def _expected(self, wait_s: float) -> float:
        first = FIRST_RETURNING if wait_s <= LONGEST_WAIT_S else FIRST_LATE_RETURNING
        return self._returning.get(_about(wait_s), first)

    def _learn(self, wait_s: float, came: float) -> None:
        self._returning[_about(wait_s)] = (1 - LEARNING) * self._expected(wait_s) + LEARNING * came


def _whose(claim: Claim) -> tuple[int, str]:
    return int(claim.priority), claim.tenant


def _about(wait_s: float) -> int:
    """Waits that are alike: within a factor of two, and on the same side of `LONGEST_WAIT_S`."""
    return math.ceil(math.log2(max(wait_s, 1.0) / LONGEST_WAIT_S))
