"""Time as this process has lived it: where a machine is so busy that even its timers come late, it goes slower.

A hang is what does not end in good time although there was a processor to end it. On a machine that others use too,
the clock on the wall does not tell the two apart.
"""

from __future__ import annotations

import asyncio
import time

_BEAT_S = 0.25
_MOST_S = 0.3  # that one beat counts, however late it came


class Pulse:
    """Attributes:
    lived_s: of this process.
    lost_s: by which beats came late.
    """

    def __init__(self) -> None:
        self.lived_s = 0.0
        self.lost_s = 0.0

    async def beat(self) -> None:
        """Runs until it is cancelled."""
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(_BEAT_S)
            passed_s = time.monotonic() - began_s
            self.lived_s += min(passed_s, _MOST_S)
            self.lost_s += max(0.0, passed_s - _MOST_S)

    async def wait(self, task: asyncio.Task[None], limit_s: float) -> bool:
        """Whether a task ends within that time of its life."""
        end_s = self.lived_s + limit_s
        while not task.done() and self.lived_s < end_s:
            await asyncio.wait({task}, timeout=1.0)
        return task.done()
