"""Asks workers how fast they are, where the policy names no profile of their model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

import grpc.aio
import msgspec

from planner.loop import PlannerLoop
from slipstream import telemetry
from slipstream.grpc_channels import client_options
from slipstream.performance import Profile, decode_profile
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.registry_pb2 import WorkerRecord, WorkerSet, WorkerState
from slipstream.v1.worker_pb2 import CacheUpdate, WatchCacheRequest
from slipstream.v1.worker_pb2_grpc import WorkerStub

log = telemetry.get_logger(__name__)

LOOK_EVERY_S = 2.0
CALL_TIMEOUT_S = 3.0


class ProfileWatch:
    """Finds the profiles of the loop's models while `follow` runs."""

    def __init__(self, loop: PlannerLoop, posted: Callable[[], WorkerSet]) -> None:
        self._loop = loop
        self._posted = posted
        self._asked: set[tuple[str, int]] = set()
        self._known: set[str] = set()

    async def follow(self) -> NoReturn:
        """Runs until cancelled."""
        while True:
            for model in self._missing():
                await self._find(model)
            await asyncio.sleep(LOOK_EVERY_S)

    def _missing(self) -> list[str]:
        return [one.model for one in self._loop.objectives.models if not one.profile and one.model not in self._known]

    async def _find(self, model: str) -> None:
        for record in self._posted().workers:
            if record.model != model or record.state != WorkerState.READY or _name(record) in self._asked:
                continue
            self._asked.add(_name(record))
            profile = await _ask(record)
            if profile is not None:
                # Roles change: what one worker of the model can do, all can.
                self._loop.know(model, profile, profile)
                self._known.add(model)
                log.info("profile_known", model=model, profile=profile.name, worker_id=record.worker_id)
                return
            log.warning(
                "no_profile",
                model=model,
                worker_id=record.worker_id,
                remedy="without one only the policy's bounds are kept: measure it with `slipstream profile`, and name "
                "it in the policy or in worker.profile",
            )


def _name(record: WorkerRecord) -> tuple[str, int]:
    return record.worker_id, record.epoch


async def _ask(record: WorkerRecord) -> Profile | None:
    """What the worker says in the first update of its feed; None when it has none."""
    try:
        async with open_channel(record.address, peer=ComponentRole.WORKER, options=client_options()) as channel:
            call = WorkerStub(channel).WatchCache(WatchCacheRequest(), timeout=CALL_TIMEOUT_S)
            try:
                update = await call.read()
            finally:
                call.cancel()
    except grpc.aio.AioRpcError:
        return None
    if not isinstance(update, CacheUpdate) or not update.profile:
        return None
    try:
        return decode_profile(update.profile)
    except msgspec.MsgspecError:
        return None
