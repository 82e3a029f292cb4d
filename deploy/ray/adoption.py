"""What an earlier pool of the same cluster has left on Ray: taken over where it fits, drained where it does not."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from deploy.ray.places import Places
from deploy.ray.worker_actor import Found
from slipstream import telemetry
from slipstream.errors import SlipstreamError, StartupError, WorkerLostError
from slipstream.v1.registry_pb2 import Role

log = telemetry.get_logger(__name__)

SILENT_AFTER_S = 5.0
"""A pool asks each of its actors every second; one that has not for this long is gone."""
_GIVE_UP_S = 7.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Adopted:
    """A worker that goes on."""

    worker_id: str
    role: Role.ValueType
    node_id: str
    ordered_unix_s: float
    started: bool
    ending: bool


@dataclass(frozen=True, slots=True)
class FoundWorkers:
    """All that was found.

    Attributes:
        ours: to go on with.
        others: worker ids of those that drain because they were ordered by other settings.
    """

    ours: tuple[Adopted, ...]
    others: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return self.others | {one.worker_id for one in self.ours}


async def found_workers(places: Places, settings_id: str) -> FoundWorkers:
    """Look, wait until whoever asked them last is silent, and have drain what was ordered by other settings.

    Raises:
        StartupError: another pool of this cluster runs.
    """
    ours, others = [], set()
    for worker_id in sorted(await places.names()):
        try:
            found = await _once_nobody_asks(places, worker_id)
        except WorkerLostError as error:
            log.info("worker_not_found_again", worker_id=worker_id, reason=error.message)
            continue
        order = found.order
        if order.settings_id == settings_id:
            ours.append(
                Adopted(worker_id, order.role, found.node_id, order.ordered_unix_s, found.started, found.ending)
            )
            continue
        others.add(worker_id)
        log.info("worker_of_other_settings", worker_id=worker_id)
        try:
            await places.drain(worker_id)
        except SlipstreamError as error:
            log.warning("worker_not_asked_to_drain", worker_id=worker_id, reason=error.message)
    return FoundWorkers(tuple(ours), frozenset(others))


async def _once_nobody_asks(places: Places, worker_id: str) -> Found:
    gives_up_s = time.monotonic() + _GIVE_UP_S
    while True:
        found = await places.describe(worker_id, keep=False)
        if found.asked_by in ("", places.asker) or found.asked_ago_s > SILENT_AFTER_S:
            return await places.describe(worker_id)
        if time.monotonic() > gives_up_s:
            raise StartupError(
                f"the worker {worker_id} of this cluster belongs to another `slipstream up --on ray` that runs; give "
                "this one another name with --name"
            )
        await asyncio.sleep(_POLL_S)
