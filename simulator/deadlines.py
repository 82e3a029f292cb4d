"""The longest that requests may take: the same for all, so that the first to come is the first to be late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from simulator.event_loop import EventLoop
from simulator.underway import Underway


class Deadlines:
    """One event waits for all of them.

    Args:
        on_late: called with each request whose time is over before it is.
    """

    def __init__(self, loop: EventLoop, on_late: Callable[[Underway], None]) -> None:
        self._loop = loop
        self._on_late = on_late
        self._requests: deque[Underway] = deque()
        self._set = False

    def watch(self, under: Underway) -> None:
        """A new request."""
        requests = self._requests
        while requests and _is_over(requests[0]):
            requests.popleft()  # what is over need not be remembered for as long
        requests.append(under)
        if not self._set:
            self._set = True
            self._loop.at(under.deadline_s, self._look)

    def _look(self) -> None:
        requests, now_s = self._requests, self._loop.now_s
        while requests and (_is_over(requests[0]) or requests[0].deadline_s <= now_s):
            under = requests.popleft()
            if not _is_over(under):
                self._on_late(under)
        self._set = bool(requests)
        if requests:
            self._loop.at(requests[0].deadline_s, self._look)


def _is_over(under: Underway) -> bool:
    return under.journey.ended_s >= 0 or bool(under.journey.error)
