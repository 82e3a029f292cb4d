"""Virtual time: what happens next, and when. Events of one instant come in the order in which they were asked for."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any


class EventLoop:
    """A clock that jumps from event to event. `now_s` never goes backwards."""

    __slots__ = ("_events", "_order", "_stopped", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._stopped = False

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` at that time, or now if it is over.

        Raises:
            ValueError: that is no time.
        """
        if not math.isfinite(time_s):
            raise ValueError(f"an event at {time_s} s would never come")
        self._order += 1
        heapq.heappush(self._events, (max(time_s, self.now_s), self._order, action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` so many seconds from now."""
        self.at(self.now_s + delay_s, action, *arguments)

    def run(self, until_s: float = math.inf) -> int:
        """Let time pass until nothing is left to happen, until then, or until `stop`; returns how many events there
        were."""
        events, count = self._events, 0
        self._stopped = False
        while events and events[0][0] <= until_s and not self._stopped:
            self.now_s, _, action, arguments = heapq.heappop(events)
            action(*arguments)
            count += 1
        return count

    def stop(self) -> None:
        """`run` ends with the event that calls this; what is left may be run later."""
        self._stopped = True
