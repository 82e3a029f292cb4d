"""The scaler of a planner that only tells what it would do."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.errors import UnavailableError
from slipstream.scaler import ScaledWorker
from slipstream.v1.registry_pb2 import Role

_MESSAGE = "this planner has no scaler (planner.scaler): it can do nothing"


class NoScaler:
    """A `slipstream.scaler.Scaler` that runs nothing."""

    async def workers(self) -> Sequence[ScaledWorker]:
        return ()

    async def start(self, model: str, role: Role.ValueType) -> str:
        raise UnavailableError(_MESSAGE)

    async def drain(self, worker_id: str) -> str:
        raise UnavailableError(_MESSAGE)

    async def flip(self, worker_id: str, role: Role.ValueType) -> None:
        raise UnavailableError(_MESSAGE)

    async def hold_lease(self, holder: str, lease_s: float) -> bool:
        return False

    async def release_lease(self, holder: str) -> None:
        return None
