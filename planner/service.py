"""The registry over gRPC: workers register and renew, frontends watch.

One task (`run`) decides when there is something to tell and puts one finished set on the board; each watcher
sends the newest set whenever it is ready for another. A watcher that reads slowly skips sets: it holds up
nobody and nothing queues for it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from planner.record_check import check_record, check_worker_id
from planner.registry import Change, Registry
from slipstream import telemetry
from slipstream.errors import SlipstreamError, UnavailableError
from slipstream.grpc_errors import abort
from slipstream.v1.registry_pb2 import (
    DeregisterRequest,
    DeregisterResponse,
    RegisterRequest,
    RegisterResponse,
    WatchRequest,
    WorkerRecord,
    WorkerSet,
    WorkerState,
)
from slipstream.v1.registry_pb2_grpc import RegistryServicer

log = telemetry.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

MAX_WATCHERS = 1024
LOAD_INTERVAL_S = 0.5
"""Changes of load alone reach watchers at most this often."""
WORKERS_INTERVAL_S = 0.05
"""A thousand workers that register at once make a few sets, not a thousand."""


class RegistryService(RegistryServicer):
    """Serves one `Registry`. `run` must run for as long as the service is served.

    Attributes:
        registry_id: changes with each start.
        watchers: open watches.
        registrations_total, expirations_total: since the start.
    """

    def __init__(self, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry_id = uuid.uuid4().hex
        self._lease_s = lease_s
        self._clock = clock
        self._registry = Registry(lease_s=lease_s, started_at_s=clock())
        self.watchers = 0
        self.registrations_total = 0
        self.expirations_total = 0
        self._closed = False
        self._pending = Change.NOTHING
        self._wake = asyncio.Event()
        self._board = asyncio.Condition()
        self._posted = self._identities = self._current_set()
        self._posted_number = self._identities_number = 1
        self._posted_at_s = self._identities_at_s = clock()

    @property
    def posted(self) -> WorkerSet:
        """The set that watchers were told last. It is never changed, only replaced."""
        return self._posted

    async def Register(self, request: RegisterRequest, context: Context) -> RegisterResponse:  # noqa: N802
        record = request.worker
        try:
            check_record(record)
            change = self._registry.register(record, self._clock())
        except SlipstreamError as error:
            await abort(context, error)
        self._tell(change)
        self.registrations_total += 1
        if change is Change.WORKERS:
            _log_record("worker_registered", record)
        return RegisterResponse(lease_s=self._lease_s)

    async def Deregister(self, request: DeregisterRequest, context: Context) -> DeregisterResponse:  # noqa: N802
        try:
            check_worker_id(request.worker_id)
        except SlipstreamError as error:
            await abort(context, error)
        change = self._registry.deregister(request.worker_id, request.epoch, self._clock())
        self._tell(change)
        if change is Change.WORKERS:
            log.info("worker_deregistered", worker_id=request.worker_id, epoch=request.epoch)
        return DeregisterResponse()

    async def Watch(self, request: WatchRequest, context: Context) -> AsyncIterator[WorkerSet]:  # noqa: N802
        if self.watchers >= MAX_WATCHERS:
            await abort(
                context,
                UnavailableError(
                    f"the registry has {self.watchers} watchers, its limit is {MAX_WATCHERS}",
                    code="too_many_watchers",
                    retry_after_s=self._lease_s,
                ),
            )
        self.watchers += 1
        try:
            seen = 0
            while await self._await_newer_than(seen, identities=request.identities):
                if request.identities:
                    seen, workers = self._identities_number, self._identities
                else:
                    seen, workers = self._posted_number, self._posted
                yield workers
        finally:
            self.watchers -= 1

    async def run(self) -> None:
        """Post what changed, let leases end, and post at least once a lease period. Runs until cancelled."""
        tick_s = min(self._lease_s / 8, LOAD_INTERVAL_S / 2)
        while True:
            now_s = self._clock()
            for record in self._registry.advance(now_s):
                self._pending = Change.WORKERS
                self.expirations_total += 1
                _log_record("worker_expired", record)
            wait_s = self._post_due_in_s(now_s)
            if wait_s <= 0:
                await self._post(now_s)
                continue
            # A changed set of workers wakes this loop; changed load waits for the next tick.
            self._wake.clear()
            try:
                async with asyncio.timeout(min(wait_s, tick_s)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """End all watches, so that the server can stop without cutting them."""
        self._closed = True
        async with self._board:
            self._board.notify_all()

    def _tell(self, change: Change) -> None:
        if change > self._pending:
            self._pending = change
        if change is Change.WORKERS:
            self._wake.set()

    def _post_due_in_s(self, now_s: float) -> float:
        if self._pending is Change.WORKERS or self._posted.settled != self._registry.settled(now_s):
            interval_s = WORKERS_INTERVAL_S
        elif self._pending is Change.LOAD:
            interval_s = LOAD_INTERVAL_S
        else:
            interval_s = self._lease_s * 0.75
        return self._posted_at_s + interval_s - now_s

    async def _post(self, now_s: float) -> None:
        before, pending, self._pending = self._posted, self._pending, Change.NOTHING
        self._posted = self._current_set()
        self._posted_number += 1
        self._posted_at_s = now_s
        due = now_s - self._identities_at_s >= self._lease_s / 2
        if pending is Change.WORKERS or before.settled != self._posted.settled or due:
            self._identities = _identities(self._posted)
            self._identities_number = self._posted_number
            self._identities_at_s = now_s
        async with self._board:
            self._board.notify_all()

    def _current_set(self) -> WorkerSet:
        return WorkerSet(
            workers=self._registry.records(),
            settled=self._registry.settled(self._clock()),
            lease_s=self._lease_s,
            registry_id=self.registry_id,
        )

    async def _await_newer_than(self, number: int, *, identities: bool) -> bool:
        def newest() -> int:
            return self._identities_number if identities else self._posted_number

        async with self._board:
            await self._board.wait_for(lambda: self._closed or newest() > number)
        return not self._closed


def _identities(workers: WorkerSet) -> WorkerSet:
    """The same set without what changes all the time."""
    copy = WorkerSet()
    copy.CopyFrom(workers)
    for record in copy.workers:
        record.ClearField("load")
        record.ClearField("renewals")
        record.ClearField("paths")
        record.ClearField("health")
        record.ClearField("startup")
    return copy


def _log_record(event: str, record: WorkerRecord) -> None:
    log.info(
        event,
        worker_id=record.worker_id,
        epoch=record.epoch,
        state=WorkerState.Name(record.state).lower(),
        address=record.address,
        model=record.model,
    )
