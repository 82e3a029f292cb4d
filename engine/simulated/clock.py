"""Simulated time beside the real one: as fast, slower, faster, or without any waiting."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """Seconds of simulated time.

    Args:
        speed: simulated seconds a real one; 0: nothing takes time.
    """

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._origin_s = time.monotonic()

    def now_s(self) -> float:
        if self.speed == 0.0:
            return 0.0
        return (time.monotonic() - self._origin_s) * self.speed

    async def until(self, then_s: float) -> None:
        """Wait for that time; others get their turn in any case."""
        await asyncio.sleep(self.real_s(then_s - self.now_s()))

    def real_s(self, seconds: float) -> float:
        """How long that takes on a wall clock."""
        return max(0.0, seconds) / self.speed if self.speed else 0.0
