"""A scaler behind gRPC (`slipstream.v1.Scaler`), as `slipstream up --autoscale` serves it; and the workers' own roles.

Every call has a deadline and fails with a `SlipstreamError`. The lease's holder goes with what it asks for, so that a
planner that slept through its lease's end changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc.aio

from slipstream.grpc_channels import client_options
from slipstream.grpc_errors import from_rpc_error
from slipstream.scaler import ScaledWorker, SickWorker
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.scaler_pb2 import (
    DrainWorkerRequest,
    HoldLeaseRequest,
    ListWorkersRequest,
    ReleaseLeaseRequest,
    ReportSickRequest,
    StartWorkerRequest,
)
from slipstream.v1.scaler_pb2_grpc import ScalerStub
from slipstream.worker_roles import change_role

if TYPE_CHECKING:
    from slipstream.v1.scaler_pb2_grpc import ScalerAsyncStub

T = TypeVar("T")

CALL_TIMEOUT_S = 3.0
START_TIMEOUT_S = 10.0
RECONNECT_BACKOFF_S = 0.5


class RemoteScaler:
    """A `slipstream.scaler.Scaler`; owns its channel while it is entered.

    Args:
        address: of the service.
        records: of the workers as the registry has them: where their roles are changed.
    """

    def __init__(self, address: str, records: Callable[[], Iterable[WorkerRecord]]) -> None:
        self._address = address
        self._records = records
        self._holder = ""
        self._stub: ScalerAsyncStub | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        channel = open_channel(
            self._address,
            peer=ComponentRole.LAUNCHER,
            options=client_options(max_reconnect_backoff_s=RECONNECT_BACKOFF_S),
        )
        self._stub = ScalerStub(await self._stack.enter_async_context(channel))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stub = None
        await self._stack.__aexit__(kind, error, trace)

    async def workers(self) -> Sequence[ScaledWorker]:
        """See `Scaler.workers`."""
        reply = await _answer(self._open.ListWorkers(ListWorkersRequest(), timeout=CALL_TIMEOUT_S))
        return [
            ScaledWorker(one.worker_id, one.model, one.role, one.started_unix_s, one.ending) for one in reply.workers
        ]

    async def start(self, model: str, role: Role.ValueType) -> str:
        """See `Scaler.start`."""
        request = StartWorkerRequest(model=model, role=role, holder=self._holder)
        return (await _answer(self._open.StartWorker(request, timeout=START_TIMEOUT_S))).worker_id

    async def drain(self, worker_id: str) -> str:
        """See `Scaler.drain`."""
        request = DrainWorkerRequest(worker_id=worker_id, holder=self._holder)
        await _answer(self._open.DrainWorker(request, timeout=CALL_TIMEOUT_S))
        return worker_id

    async def flip(self, worker_id: str, role: Role.ValueType) -> None:
        """See `Scaler.flip`: the worker itself is asked."""
        await change_role(self._records(), worker_id, role, timeout_s=CALL_TIMEOUT_S)

    async def hold_lease(self, holder: str, lease_s: float) -> bool:
        """See `Scaler.hold_lease`."""
        self._holder = holder
        request = HoldLeaseRequest(holder=holder, lease_s=lease_s)
        return (await _answer(self._open.HoldLease(request, timeout=CALL_TIMEOUT_S))).held

    async def release_lease(self, holder: str) -> None:
        """See `Scaler.release_lease`."""
        await _answer(self._open.ReleaseLease(ReleaseLeaseRequest(holder=holder), timeout=CALL_TIMEOUT_S))

    async def report(self, sick: SickWorker) -> None:
        """See `Reporter.report`."""
        request = ReportSickRequest(
            worker_id=sick.worker_id,
            node=sick.node,
            device_ids=sick.device_ids,
            device=sick.device,
            reasons=sick.reasons,
        )
        await _answer(self._open.ReportSick(request, timeout=CALL_TIMEOUT_S))

    @property
    def _open(self) -> ScalerAsyncStub:
        assert self._stub is not None, "not entered"
        return self._stub


async def _answer(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
