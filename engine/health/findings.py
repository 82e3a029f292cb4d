"""What is wrong, each thing by itself, and how long it has to last before it counts."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from slipstream.v1.registry_pb2 import HealthState

SUSPECT, SICK = HealthState.SUSPECT, HealthState.SICK
FOR_GOOD = math.inf


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong now.

    Attributes:
        code: one word, for programs; place: of which device, so that two devices' do not hide each other.
        state: that it makes of the worker.
        hold_s: it counts once it has been there for so long without a break.
        keep_s: and goes on counting for so long after it was seen last; None: the policy's usual time.
    """

    code: str
    state: HealthState.ValueType
    text: str
    place: str = ""
    hold_s: float = 0.0
    keep_s: float | None = None


class Growth:
    """By how much a counter grew within a time. One that fell was reset, and begins anew."""

    __slots__ = ("_seen", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, value: int | None, now_s: float) -> int:
        """Its growth within the window up to now; None: not told, and nothing grew."""
        if value is None:
            return 0
        if self._seen and value < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now_s, value))
        # The last one before the window is what it grew from.
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - self._window_s:
            self._seen.popleft()
        return value - self._seen[0][1]
