"""Keeps sick workers out of service, beside the registry: looks each second, and tells the workers.

It asks a worker to say of itself that it is fenced; everybody learns that from the registry, and a control plane that
is killed leaves nothing to be forgotten. A worker that cannot be asked is as good as gone already: its lease ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NoReturn

import grpc.aio

from planner.fencing import HELD, Fencing, Orders
from planner.stragglers import SpeedBook
from slipstream import telemetry
from slipstream.errors import SlipstreamError
from slipstream.grpc_channels import client_options
from slipstream.grpc_errors import from_rpc_error
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.planner_pb2 import TrafficReport
from slipstream.v1.registry_pb2 import WorkerRecord, WorkerSet
from slipstream.v1.worker_pb2 import SetFenceRequest
from slipstream.v1.worker_pb2_grpc import WorkerStub
from slipstream.worker_settings import HealthSettings

log = telemetry.get_logger(__name__)

LOOK_EVERY_S = 1.0
CALL_TIMEOUT_S = 2.0


class FenceKeeper:
    """Fences while `follow` runs.

    Args:
        posted: the registry's set as it was posted last.

    Attributes:
        speeds: what frontends saw of the workers' speed.
        held: of the last look; by worker, what keeps it in service although it is sick.
        done: orders by kind (fence, free) and result.
    """

    def __init__(
        self,
        limits: HealthSettings,
        posted: Callable[[], WorkerSet],
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits
        self._posted = posted
        self._clock = clock
        self._unix_clock = unix_clock
        self._fencing = Fencing(limits)
        self.speeds = SpeedBook(limits)
        self.held: Mapping[str, str] = {}
        self.done: Counter[tuple[str, str]] = Counter()

    @property
    def left(self) -> int:
        """How many more may be fenced within this hour."""
        return self._fencing.left(self._clock())

    @property
    def posted(self) -> WorkerSet:
        """What it looks at."""
        return self._posted()

    def take_report(self, report: TrafficReport) -> None:
        """What a frontend saw of the workers' speed."""
        self.speeds.take(report.frontend_id, report.speeds, self._clock())

    async def follow(self) -> NoReturn:
        """Look again and again, whatever fails. Runs until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> Orders:
        """Decide by what the registry has now, and have it done."""
        posted, now_s = self._posted(), self._clock()
        slow = self.speeds.judge(posted.workers, now_s)
        if not posted.settled:
            return Orders()  # who has not been heard yet looks like who is not there
        orders = self._fencing.decide(posted.workers, slow, now_s, self._unix_clock())
        self._tell_held(orders.held)
        for record, why in orders.fence:
            if await self._order(record, fenced=True, because=why):
                self._fencing.fenced(record, now_s)
        for record in orders.free:
            await self._order(record, fenced=False, because="")
        return orders

    async def _order(self, record: WorkerRecord, *, fenced: bool, because: str) -> bool:
        kind = "fence" if fenced else "free"
        try:
            await _set_fence(record, fenced=fenced, because=because)
        except SlipstreamError as error:
            self.done[kind, "failed"] += 1
            log.warning("not_fenced" if fenced else "not_freed", worker_id=record.worker_id, reason=error.message)
            return False
        self.done[kind, "done"] += 1
        log.warning("worker_fenced" if fenced else "worker_freed", worker_id=record.worker_id, because=because)
        return True

    def _tell_held(self, held: Mapping[str, str]) -> None:
        for worker_id, word in held.items():
            if self.held.get(worker_id) != word:
                log.warning("sick_worker_stays", worker_id=worker_id, because=HELD[word])
        self.held = held


async def _set_fence(record: WorkerRecord, *, fenced: bool, because: str) -> None:
    request = SetFenceRequest(fenced=fenced, because=because, epoch=record.epoch)
    async with open_channel(record.address, peer=ComponentRole.WORKER, options=client_options()) as channel:
        try:
            await WorkerStub(channel).SetFence(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
