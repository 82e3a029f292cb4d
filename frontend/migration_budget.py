"""How many requests may be moved to other workers because theirs were lost: a share of all there are.

A request that kills whatever works on it is stopped by its own limit (`frontend.max_migrations`); this one stops many
of them, and a pool that falls over faster than it comes back: then every move makes it worse. A share needs no
agreement between frontends: each keeps to it, so all do. Pure; the time is passed in.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 10.0
_SLOTS = 10


class MigrationBudget:
    """One frontend process's.

    Args:
        share: of the requests that were with the workers within the window.
        least: migrations that are always allowed: a share of few requests is nothing.
    """

    def __init__(self, share: float, least: int) -> None:
        self._share = share
        self._least = least
        self._open = 0
        self._ended = _Lately()
        self._moved = _Lately()

    def begun(self) -> None:
        """A request goes to the workers."""
        self._open += 1

    def ended(self, now_s: float) -> None:
        """It is over, in whatever way."""
        self._open -= 1
        self._ended.add(now_s)

    def limit(self, now_s: float) -> int:
        """Migrations within a window, as of now."""
        return max(self._least, int(self._share * (self._open + self._ended.count(now_s))))

    def take(self, now_s: float) -> bool:
        """Whether one more may be moved; if so it counts."""
        if self._moved.count(now_s) >= self.limit(now_s):
            return False
        self._moved.add(now_s)
        return True


class _Lately:
    """A count of the last window, in steps of a second."""

    __slots__ = ("_slots", "_total")

    def __init__(self) -> None:
        self._slots: deque[tuple[int, int]] = deque()
        self._total = 0

    def add(self, now_s: float) -> None:
        slot = int(now_s * _SLOTS / WINDOW_S)
        count = self._slots.pop()[1] if self._slots and self._slots[-1][0] == slot else 0
        self._slots.append((slot, count + 1))
        self._total += 1
        self._forget(slot)

    def count(self, now_s: float) -> int:
        self._forget(int(now_s * _SLOTS / WINDOW_S))
        return self._total

    def _forget(self, slot: int) -> None:
        while self._slots and self._slots[0][0] <= slot - _SLOTS:
            self._total -= self._slots.popleft()[1]
