"""The pool on Ray as a planner sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from deploy.ray.pool import Pool
from deploy.scaler_service import MAX_REASON_CHARS, PlannerLease
from slipstream.scaler import ScaledWorker, SickWorker
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.worker_roles import change_role

FLIP_TIMEOUT_S = 3.0


class RayScaler:
    """A `slipstream.scaler.Scaler` and `Reporter` over a pool in the same process.

    Args:
        records: of the workers as the registry has them: where their roles are changed.
    """

    def __init__(
        self,
        pool: Pool,
        records: Callable[[], Iterable[WorkerRecord]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._records = records
        self._clock = clock
        self.lease = PlannerLease()

    async def workers(self) -> Sequence[ScaledWorker]:
        """See `Scaler.workers`."""
        return self._pool.workers()

    async def start(self, model: str, role: Role.ValueType) -> str:
        """See `Scaler.start`."""
        return await self._pool.start(model, role)

    async def drain(self, worker_id: str) -> str:
        """See `Scaler.drain`."""
        self._pool.drain(worker_id)
        return worker_id

    async def flip(self, worker_id: str, role: Role.ValueType) -> None:
        """See `Scaler.flip`."""
        await change_role(self._records(), worker_id, role, timeout_s=FLIP_TIMEOUT_S)

    async def hold_lease(self, holder: str, lease_s: float) -> bool:
        """See `Scaler.hold_lease`. Nobody acts while the cluster starts: what was asked for shall be there first."""
        return self._pool.whole and self.lease.hold(holder, lease_s, self._clock())

    async def release_lease(self, holder: str) -> None:
        """See `Scaler.release_lease`."""
        self.lease.release(holder)

    async def report(self, sick: SickWorker) -> None:
        """See `Reporter.report`. Ray cannot be told that a node is sick; none is placed on it any more."""
        if sick.device:
            self._pool.bar(sick.worker_id, ", ".join(sick.reasons)[:MAX_REASON_CHARS])
