"""Follows every worker's cache feed (Worker.WatchCache), so that `known_caches` says what is where and who is busy.

One call a worker, open as long as the worker is registered. A feed that breaks, ends, or skips a number is asked for
anew, and begins with everything; a worker that has no feed is asked again now and then. Each frontend follows
by itself: several know the same without knowing of each other, and one that dies takes nothing with it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import grpc.aio

from frontend.dispatch_metrics import CACHE_FEEDS_LOST, INDEX_BLOCKS
from frontend.known_caches import KnownCaches
from frontend.worker_channels import Place, WorkerChannels
from slipstream import telemetry
from slipstream.v1.registry_pb2 import WorkerRecord, WorkerState
from slipstream.v1.worker_pb2 import CacheUpdate, WatchCacheRequest
from slipstream.v1.worker_pb2_grpc import WorkerStub

log = telemetry.get_logger(__name__)

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
UNSERVED_BACKOFF_S = 30.0
"""Pause before a worker that does not serve the call at all is asked again."""

UPDATES_PER_S = 1000.0
"""Updates that one frontend wants to hear in a second, of all workers together: each costs some 0.23 ms."""

MIN_INTERVAL_MS = 20
TIDY_PAUSE_S = 0.25

Incarnation = tuple[str, int, str]
"""A worker's id, epoch and address."""


class CacheWatch:
    """Follows workers while the context is entered; tell it by `retain` which.

    Args:
        frontend_id: the name that this frontend's requests carry.
        clock: of the routes that are chosen by what is heard.
    """

    def __init__(
        self,
        caches: KnownCaches,
        channels: WorkerChannels,
        *,
        frontend_id: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._caches = caches
        self._channels = channels
        self._frontend_id = frontend_id
        self._following: dict[Incarnation, asyncio.Task[None]] = {}
        self._tidying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._tidying = asyncio.create_task(self._tidy(), name="index-tidy")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._following.values()]
        tasks += [self._tidying] if self._tidying is not None else []
        await _end(tasks)

    async def retain(self, records: Iterable[WorkerRecord]) -> None:
        """Follow these workers and no others. What was known of those that are gone is forgotten."""
        serving = {(one.worker_id, one.epoch, one.address): one for one in records if one.state != WorkerState.STARTING}
        gone = self._following.keys() - serving.keys()
        tasks = [self._following.pop(name) for name in gone]
        await _end(tasks)
        for worker_id in {name[0] for name in gone} - {name[0] for name in serving}:
            self._caches.forget(worker_id)
        interval_ms = max(MIN_INTERVAL_MS, round(1000 * len(serving) / UPDATES_PER_S))
        for name in serving.keys() - self._following.keys():
            request = WatchCacheRequest(frontend_id=self._frontend_id, interval_ms=interval_ms)
            self._following[name] = asyncio.create_task(self._follow(*name, request), name=f"cache-watch {name[0]}")

    async def _follow(self, worker_id: str, epoch: int, address: str, request: WatchCacheRequest) -> None:
        """Watch one incarnation of a worker, and watch it again after every failure. Runs until cancelled."""
        pause_s, told = FIRST_BACKOFF_S, False
        while True:
            try:
                heard = await self._watch_once(worker_id, epoch, address, request)
                reason = "the feed ended, or an update is missing"
            except grpc.aio.AioRpcError as error:
                heard, reason = False, error.details() or error.code().name
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    pause_s = UNSERVED_BACKOFF_S
            finally:
                self._caches.lost(worker_id)
            if heard:
                pause_s, told = FIRST_BACKOFF_S, False
            CACHE_FEEDS_LOST.inc()
            if not told:
                log.info("cache_feed_lost", worker_id=worker_id, reason=reason)
                told = True
            await asyncio.sleep(random.uniform(pause_s / 2, pause_s))
            pause_s = max(pause_s, min(pause_s * 2, MAX_BACKOFF_S))

    async def _watch_once(self, worker_id: str, epoch: int, address: str, request: WatchCacheRequest) -> bool:
        """Until the feed ends, skips an update, or tells of another incarnation. Returns whether anything came."""
        place = Place(address, epoch)
        channel = self._channels.acquire(place)
        call = WorkerStub(channel).WatchCache(request)
        heard = 0
        try:
            while True:
                update = await call.read()
                if not isinstance(update, CacheUpdate) or update.sequence != heard or update.epoch != epoch:
                    return heard > 0
                heard += 1
                self._caches.apply(worker_id, update, self._clock())
        finally:
            call.cancel()
            self._channels.release(place)

    async def _tidy(self) -> None:
        """Take what growth left over off the requests' way. Runs until cancelled."""
        while True:
            more = self._caches.index.tidy()
            INDEX_BLOCKS.set(len(self._caches.index))
            await asyncio.sleep(0.002 if more else TIDY_PAUSE_S)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (failure := task.exception()) is not None:
            raise failure
