"""Whether a worker takes a request: how many it has open, and whether it serves the model asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from engine.open_work import OpenWork
from slipstream.errors import ModelNotFoundError, UnavailableError, WorkerDrainingError


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
        self.open_count = 0
        self.refused_total = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place while the block runs.

        Raises:
            WorkerDrainingError, UnavailableError: there is none.
        """
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
        self.open_count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.open_count -= 1
            if self.open_count == 0:
                self._idle.set()

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


def check_model(asked: str, served: str) -> None:
    """Refuse a request for another model; one that names none takes what is served.

    Raises:
        ModelNotFoundError: this worker serves something else.
    """
    if asked and asked != served:
        raise ModelNotFoundError(f"this worker serves {served}, not {asked}", param="model")
