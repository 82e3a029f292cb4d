"""Whether a worker takes a request: how many it has open, and whether it serves the model asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.open_work import OpenWork
from slipstream.errors import EngineSilentError, ModelNotFoundError, UnavailableError, WorkerDrainingError


@dataclass(slots=True, eq=False)
class _Open:
    """A request that holds a place. `given_up`: its task was cancelled from here, and nobody else may be meant."""

    task: asyncio.Task[Any] | None
    given_up: bool = False


class Admission:
    """Counts open requests against a limit; draining refuses new ones and waits for the open ones.

    Args:
        limit: requests open at the same time, running and queued.

    Attributes:
        work: what the open requests amount to.
    """

    def __init__(self, *, limit: int) -> None:
        self.work = OpenWork()
        self._limit = limit
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._over = asyncio.Event()
        self._open: set[_Open] = set()
        self._standstill = ""
        self.refused_total = 0

    @property
    def open_count(self) -> int:
        """Requests that hold a place."""
        return len(self._open)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place while the block runs, in one task.

        Raises:
            WorkerDrainingError, UnavailableError: there is none.
            EngineSilentError: the engine stands still; also in the middle of the block.
        """
        if self._standstill:
            self.refused_total += 1
            raise EngineSilentError(self._standstill, retry_after_s=1.0)
        if self._draining:
            self.refused_total += 1
            raise WorkerDrainingError("this worker is draining and takes no new requests")
        if self.open_count >= self._limit:
            self.refused_total += 1
            raise UnavailableError(
                f"this worker has {self.open_count} requests open, its limit (worker.max_running + worker.max_waiting)",
                code="worker_busy",
                retry_after_s=1.0,
            )
        place = _Open(_own_task())
        self._open.add(place)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not place.given_up or place.task is None or place.task.uncancel() > 0:
                raise
            raise EngineSilentError(self._standstill or "the worker's engine took no step for a while") from None
        finally:
            self._open.discard(place)
            if not self._open:
                self._idle.set()

    def stand_still(self, why: str) -> None:
        """The engine does not go on: whoever is admitted, or comes from now on, gets an error instead."""
        self._standstill = why
        for place in self._open:
            if not place.given_up and place.task is not None:
                place.given_up = True
                place.task.cancel()

    def go_on(self) -> None:
        """The engine does again; others may come."""
        self._standstill = ""

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    async def idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    def close(self) -> None:
        """There will be no more requests: what only waits for some may end."""
        self._over.set()

    async def over(self) -> None:
        """Return when there will be no more requests."""
        await self._over.wait()


def _own_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # outside of an event loop
        return None


def check_model(asked: str, served: str) -> None:
    """Refuse a request for another model; one that names none takes what is served.

    Raises:
        ModelNotFoundError: this worker serves something else.
    """
    if asked and asked != served:
        raise ModelNotFoundError(f"this worker serves {served}, not {asked}", param="model")
