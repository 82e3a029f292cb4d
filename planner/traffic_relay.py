"""Passes frontends' reports on to planners in other processes, which stand by for the one beside the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from slipstream.errors import UnavailableError
from slipstream.v1.planner_pb2 import TrafficReport

MAX_WATCHERS = 16
MOST_WAITING = 4096
"""Reports that one watcher may be behind; of more the oldest are lost, as reports may be."""


class TrafficRelay:
    """Reports come in, each watcher gets those that come while it watches."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[TrafficReport | None]] = set()

    @property
    def watched(self) -> bool:
        return bool(self._watchers)

    def publish(self, report: TrafficReport) -> None:
        """Tell all watchers; never waits."""
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(report)

    async def watch(self) -> AsyncGenerator[TrafficReport, None]:
        """Until `close`.

        Raises:
            UnavailableError: there are `MAX_WATCHERS` already.
        """
        if len(self._watchers) >= MAX_WATCHERS:
            raise UnavailableError(f"{len(self._watchers)} planners watch the traffic, the limit is {MAX_WATCHERS}")
        queue: asyncio.Queue[TrafficReport | None] = asyncio.Queue(MOST_WAITING)
        self._watchers.add(queue)
        try:
            while (report := await queue.get()) is not None:
                yield report
        finally:
            self._watchers.discard(queue)

    def close(self) -> None:
        """End all watches."""
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)
