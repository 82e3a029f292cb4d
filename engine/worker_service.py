"""What every worker serves besides its roles' calls: its record, its role, its cache feed, and gRPC's own services."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.cache_feed import CacheFeed
from engine.protocol import Engine
from slipstream import grpc_errors
from slipstream.errors import InvalidRequestError, SlipstreamError
from slipstream.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from slipstream.v1.registry_pb2 import Role, TransferPath, WorkerRecord

SetRole = Callable[[Role.ValueType], None]
"""Gives the worker that role; raises WorkerDrainingError."""
SetFence = Callable[[bool, str], None]
"""Fences the worker, or ends that, and why; raises WorkerDrainingError."""
MAX_BECAUSE_CHARS = 240

LIVE_SERVICE = "slipstream.v1.Worker"
"""gRPC's health checks of this one tell whether the worker lives; those of "", whether it takes new requests."""


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """See `slipstream.v1.Worker`.

    Args:
        record: of this worker as it is now.
    """

    def __init__(
        self,
        record: Callable[[], WorkerRecord],
        set_role: SetRole,
        engine: Engine,
        feed: CacheFeed,
        set_fence: SetFence,
    ) -> None:
        self._record = record
        self._set_role = set_role
        self._set_fence = set_fence
        self._engine = engine
        self._feed = feed

    async def GetStatus(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.WorkerRecord:
        return self._record()

    async def ProbePath(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.ProbePathRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> TransferPath:
        try:
            if not request.peer.address:
                raise InvalidRequestError(
                    "peer.address: host:port of the peer's transfer agent is needed", param="peer"
                )
            return await self._engine.probe_path(request.worker_id, request.peer, request.transport)
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    async def WatchCache(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.CacheUpdate]:
        async with aclosing(self._feed.updates(request.frontend_id, request.interval_ms / 1000)) as updates:
            async for update in updates:
                yield update

    async def SetRole(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.SetRoleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.WorkerRecord:
        try:
            if request.role not in (Role.ROLE_PREFILL, Role.ROLE_DECODE):
                raise InvalidRequestError("role: ROLE_PREFILL or ROLE_DECODE is needed", param="role")
            self._check_epoch(request.epoch)
            self._set_role(request.role)
            return self._record()
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    async def SetFence(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.SetFenceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.WorkerRecord:
        try:
            if len(request.because) > MAX_BECAUSE_CHARS or not request.because.isprintable():
                raise InvalidRequestError(f"because: at most {MAX_BECAUSE_CHARS} printable characters", param="because")
            self._check_epoch(request.epoch)
            self._set_fence(request.fenced, request.because)
            return self._record()
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    def _check_epoch(self, meant: int) -> None:
        """Refuse what was meant for another incarnation; 0 means whichever runs."""
        epoch = self._record().epoch
        if meant not in (0, epoch):
            raise InvalidRequestError(
                f"epoch: {meant} is meant, but {epoch} of this worker runs by now",
                param="epoch",
                code="stale_epoch",
            )


def add_standard_services(
    server: grpc.aio.Server, role_services: tuple[str, ...], worker_service: WorkerService
) -> health.aio.HealthServicer:
    """Health, reflection and `Worker` beside the services of the roles, which are added already."""
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    worker_pb2_grpc.add_WorkerServicer_to_server(worker_service, server)
    names = (*role_services, LIVE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return health_service
