"""Requests for a model that has no worker now, and for which the planner starts one: they wait here for it.

The planner says, with each of its answers to a traffic report, which models it lets go to zero and how long a start
takes. What waits is told to it as queued, which is what makes it start a worker. Whoever could not be served within its
deadline is refused at once, and told when to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from frontend.traffic_count import Queued
from slipstream.errors import NoWorkerError

HEARD_S = 15.0
"""What the planner said longer ago does not count: it may be gone, and then nobody starts anything."""
LOOK_EVERY_S = 0.05
PATIENCE = 3.0
"""Times what a start takes: a worker that is not there by then is not awaited."""
LEAST_PATIENCE_S = 10.0
LEAST_RETRY_S = 1.0
RETRY_S = 2.0
"""Where nobody is known to start a worker."""


@dataclass(slots=True, eq=False)
class _Waiting:
    model: str
    service_class: str
    since_s: float


class ColdStarts:
    """Of one frontend process.

    Args:
        most: requests that may wait; more are refused.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._start_s: dict[str, float] = {}
        self._heard_s = 0.0
        self._waiting: dict[_Waiting, None] = {}

    def take(self, start_s: Mapping[str, float]) -> None:
        """The planner's newest word: what a start takes, by model that it starts from zero."""
        self._start_s, self._heard_s = dict(start_s), self._clock()

    def starts(self, model: str) -> bool:
        """Whether the planner starts a worker where a request for this model comes."""
        return model in self._start_s and self._clock() - self._heard_s < HEARD_S

    def queued(self) -> dict[tuple[str, str], Queued]:
        """What waits here, by model and class. Prompts are not counted in tokens before a worker says how."""
        found: dict[tuple[str, str], Queued] = {}
        for one in self._waiting:
            part = found.setdefault((one.model, one.service_class), Queued())
            part.requests += 1
            part.oldest_wait_s = max(part.oldest_wait_s, self._clock() - one.since_s)
        return found

    async def wait(self, model: str, service_class: str, left_s: float, served: Callable[[], bool]) -> None:
        """Until the model is served.

        Args:
            left_s: that the request may take.

        Raises:
            NoWorkerError: nobody starts one, it would not be there in time, or it did not come.
        """
        if not self.starts(model):
            raise NoWorkerError(f"No decode worker for model '{model}' is ready.", retry_after_s=RETRY_S)
        since_s = self._clock()
        first_s = min((one.since_s for one in self._waiting if one.model == model), default=since_s)
        start_s = self._start_s[model]
        to_come_s = max(0.0, first_s + start_s - since_s)
        async with self._counted(_Waiting(model, service_class, since_s), at_once=to_come_s > left_s):
            if to_come_s > left_s:
                raise self._refusal(model, to_come_s, f"more than the {left_s:.1f} s that the request may take")
            if len(self._waiting) > self._most:
                raise self._refusal(model, to_come_s, f"and {self._most} requests wait for it (admission.queue)")
            limit_s = max(PATIENCE * start_s, LEAST_PATIENCE_S)
            while not served():
                if self._clock() - first_s > limit_s:
                    raise self._refusal(model, start_s, f"and none has come within {limit_s:.0f} s")
                await asyncio.sleep(LOOK_EVERY_S)

    @asynccontextmanager
    async def _counted(self, one: _Waiting, *, at_once: bool) -> AsyncIterator[None]:
        # One that is refused counts as refused, which asks for a worker as well.
        if not at_once:
            self._waiting[one] = None
        try:
            yield
        finally:
            self._waiting.pop(one, None)

    def _refusal(self, model: str, to_come_s: float, why: str) -> NoWorkerError:
        return NoWorkerError(
            f"Model '{model}' has no worker now; one takes {to_come_s:.1f} s to start, {why}.",
            retry_after_s=max(LEAST_RETRY_S, to_come_s),
        )
