"""The scaler on Ray over gRPC, for planners in other processes: that of the control plane, and any that stands by."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from deploy.ray.pool import Pool
from deploy.ray.scaler import RayScaler
from deploy.scaler_server import served
from deploy.scaler_service import LONGEST_LEASE_S, MAX_HOLDER_CHARS
from slipstream import grpc_errors
from slipstream.errors import InvalidRequestError, SlipstreamError, UnavailableError
from slipstream.scaler import SickWorker
from slipstream.v1.scaler_pb2 import (
    DrainWorkerReply,
    DrainWorkerRequest,
    HoldLeaseReply,
    HoldLeaseRequest,
    ListWorkersReply,
    ListWorkersRequest,
    ReleaseLeaseReply,
    ReleaseLeaseRequest,
    ReportSickReply,
    ReportSickRequest,
    ScaledWorker,
    StartWorkerReply,
    StartWorkerRequest,
)
from slipstream.v1.scaler_pb2_grpc import ScalerServicer

Context = grpc.aio.ServicerContext[Any, Any]


class RayScalerService(ScalerServicer):
    """Serves one `RayScaler`. Roles are not changed here: a remote planner asks the workers themselves."""

    def __init__(self, pool: Pool, scaler: RayScaler, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._scaler = scaler
        self._clock = clock

    async def ListWorkers(self, request: ListWorkersRequest, context: Context) -> ListWorkersReply:  # noqa: N802
        workers = [
            ScaledWorker(
                worker_id=one.worker_id,
                model=one.model,
                role=one.role,
                started_unix_s=one.started_s,
                ending=one.ending,
            )
            for one in await self._scaler.workers()
        ]
        return ListWorkersReply(workers=workers, most_workers=self._pool.most_workers)

    async def StartWorker(self, request: StartWorkerRequest, context: Context) -> StartWorkerReply:  # noqa: N802
        try:
            self._check_holder(request.holder)
            return StartWorkerReply(worker_id=await self._scaler.start(request.model, request.role))
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    async def DrainWorker(self, request: DrainWorkerRequest, context: Context) -> DrainWorkerReply:  # noqa: N802
        try:
            self._check_holder(request.holder)
            await self._scaler.drain(request.worker_id)
            return DrainWorkerReply()
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    async def HoldLease(self, request: HoldLeaseRequest, context: Context) -> HoldLeaseReply:  # noqa: N802
        if not 1 <= len(request.holder) <= MAX_HOLDER_CHARS or not 0 < request.lease_s <= LONGEST_LEASE_S:
            wrong = f"holder: 1 to {MAX_HOLDER_CHARS} characters; lease_s: above 0, at most {LONGEST_LEASE_S:g}"
            await grpc_errors.abort(context, InvalidRequestError(wrong, param="holder"))
        held = await self._scaler.hold_lease(request.holder, request.lease_s)
        return HoldLeaseReply(held=held, holder=self._scaler.lease.holder)

    async def ReleaseLease(self, request: ReleaseLeaseRequest, context: Context) -> ReleaseLeaseReply:  # noqa: N802
        await self._scaler.release_lease(request.holder)
        return ReleaseLeaseReply()

    async def ReportSick(self, request: ReportSickRequest, context: Context) -> ReportSickReply:  # noqa: N802
        sick = SickWorker(
            worker_id=request.worker_id,
            node=request.node,
            device_ids=tuple(request.device_ids),
            device=request.device,
            reasons=tuple(request.reasons),
        )
        await self._scaler.report(sick)
        return ReportSickReply()

    def _check_holder(self, holder: str) -> None:
        """Refuse a planner that lost the lease and has not noticed yet."""
        if holder and self._scaler.lease.held_by_another(holder, self._clock()):
            raise UnavailableError(f"{self._scaler.lease.holder} holds the planner's lease by now", code="lease_lost")


@asynccontextmanager
async def serving(pool: Pool, address: str) -> AsyncIterator[None]:
    """Let planners act while the block runs.

    Args:
        address: to listen on, a Unix socket as a rule.

    Raises:
        StartupError: it cannot be listened on.
    """
    async with served(RayScalerService(pool, RayScaler(pool, pool.records)), address):
        yield
