"""What `slipstream up --autoscale` lets a planner do: start and drain workers of its cluster, over gRPC.

The service lives in the launcher's process, which owns the workers' processes; the planner that calls it may be killed
at any time, and so may the launcher's planner be another one tomorrow. It listens on a Unix socket that only the user
who started the cluster can reach.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from deploy.plan import CONTROL_PLANE, FRONTEND, LocalCluster, seat_name
from deploy.scaler_server import served
from deploy.supervisor import Supervisor
from slipstream import grpc_errors, registry_watch
from slipstream.background import background
from slipstream.errors import InvalidRequestError, SlipstreamError, StartupError, UnavailableError
from slipstream.security import audit
from slipstream.v1.registry_pb2 import Role, WorkerSet, WorkerState
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

MAX_HOLDER_CHARS = 256
MAX_REASON_CHARS = 512
LONGEST_LEASE_S = 3600.0

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class PlannerLease:
    """Who may act. Pure: the time is passed in."""

    holder: str = ""
    until_s: float = 0.0

    def hold(self, holder: str, lease_s: float, now_s: float) -> bool:
        """Take or renew it; False while another has it."""
        if self.held_by_another(holder, now_s):
            return False
        self.holder, self.until_s = holder, now_s + lease_s
        return True

    def release(self, holder: str) -> None:
        """Let another take it at once; whoever has it not gives nothing away."""
        if self.holder == holder:
            self.holder = ""

    def held_by_another(self, holder: str, now_s: float) -> bool:
        return self.holder not in ("", holder) and now_s < self.until_s


@dataclass(slots=True)
class _Seated:
    """A worker of ours: where it sits, and how it was started."""

    seat: int
    role: Role.ValueType
    started_unix_s: float


class ScalerService(ScalerServicer):
    """The workers of one local cluster.

    Args:
        model: that all of them serve.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        supervisor: Supervisor,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._supervisor = supervisor
        self._clock = clock
        self._unix_clock = unix_clock
        self._lease = PlannerLease()
        settings = cluster.settings.cluster
        roles = [Role.ROLE_PREFILL] * settings.prefill + [Role.ROLE_DECODE] * settings.decode
        self._seated = {seat_name(number): _Seated(number, role, unix_clock()) for number, role in enumerate(roles)}
        self._barred: dict[int, str] = {}
        self._reported: set[str] = set()
        self._numbers = itertools.count(len(roles))
        self.model = cluster.settings.served_model_name or ""

    async def follow_registry(self) -> None:
        """Tell people of each worker that a planner had started, once it is ready. Runs until cancelled."""
        told: set[tuple[str, int]] = set()
        initial = set(self._seated)

        async def take(workers: WorkerSet) -> None:
            for record in workers.workers:
                incarnation = (record.worker_id, record.epoch)
                later = record.worker_id in self._seated and record.worker_id not in initial
                if later and record.state == WorkerState.READY and incarnation not in told:
                    told.add(incarnation)
                    self._supervisor.tell(record.worker_id, "ready")

        address = self._cluster.settings.control_plane.address
        await registry_watch.follow(address, take=take, lost=lambda reason: None, identities=True)

    async def ListWorkers(self, request: ListWorkersRequest, context: Context) -> ListWorkersReply:  # noqa: N802
        retiring = self._supervisor.retiring
        workers = [
            ScaledWorker(
                worker_id=name,
                model=self.model,
                role=one.role,
                started_unix_s=one.started_unix_s,
                ending=name in retiring,
            )
            for name, one in self._there().items()
        ]
        return ListWorkersReply(workers=workers, most_workers=self._cluster.seats.count)

    async def StartWorker(self, request: StartWorkerRequest, context: Context) -> StartWorkerReply:  # noqa: N802
        try:
            self._check_holder(request.holder)
            return StartWorkerReply(worker_id=self._start(request.model, request.role))
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    async def DrainWorker(self, request: DrainWorkerRequest, context: Context) -> DrainWorkerReply:  # noqa: N802
        try:
            self._check_holder(request.holder)
            self._check_ready()
            if request.worker_id in (CONTROL_PLANE, FRONTEND):
                raise InvalidRequestError(f"worker_id: {request.worker_id} is no worker", param="worker_id")
            self._supervisor.retire(request.worker_id)
            return DrainWorkerReply()
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    async def HoldLease(self, request: HoldLeaseRequest, context: Context) -> HoldLeaseReply:  # noqa: N802
        if not 1 <= len(request.holder) <= MAX_HOLDER_CHARS or not 0 < request.lease_s <= LONGEST_LEASE_S:
            wrong = f"holder: 1 to {MAX_HOLDER_CHARS} characters; lease_s: above 0, at most {LONGEST_LEASE_S:g}"
            await grpc_errors.abort(context, InvalidRequestError(wrong, param="holder"))
        # Nobody acts while the cluster starts: what it was started with shall be there first.
        held = self._supervisor.keeps and self._lease.hold(request.holder, request.lease_s, self._clock())
        return HoldLeaseReply(held=held, holder=self._lease.holder)

    async def ReleaseLease(self, request: ReleaseLeaseRequest, context: Context) -> ReleaseLeaseReply:  # noqa: N802
        self._lease.release(request.holder)
        return ReleaseLeaseReply()

    async def ReportSick(self, request: ReportSickRequest, context: Context) -> ReportSickReply:  # noqa: N802
        """A worker whose device is sick leaves a seat on which none is put any more, until the cluster is restarted."""
        one, why = self._there().get(request.worker_id), ", ".join(request.reasons)[:MAX_REASON_CHARS]
        if one is not None and request.worker_id not in self._reported:
            self._reported.add(request.worker_id)
            self._supervisor.tell(request.worker_id, "sick", why)
            if request.device:
                self._barred[one.seat] = why
        return ReportSickReply()

    def _check_holder(self, holder: str) -> None:
        """Refuse a planner that lost the lease and has not noticed yet."""
        if holder and self._lease.held_by_another(holder, self._clock()):
            raise UnavailableError(f"{self._lease.holder} holds the planner's lease by now", code="lease_lost")

    def _check_ready(self) -> None:
        if not self._supervisor.keeps:
            raise UnavailableError("the cluster is still starting, or stopping", code="not_ready")

    def _start(self, model: str, role: Role.ValueType) -> str:
        if role not in (Role.ROLE_PREFILL, Role.ROLE_DECODE):
            raise InvalidRequestError("role: ROLE_PREFILL or ROLE_DECODE is needed", param="role")
        if model != self.model:
            raise InvalidRequestError(f"model: this cluster serves {self.model}, not {model[:256]}", param="model")
        self._check_ready()
        there, seats = self._there(), self._cluster.seats
        empty = set(range(seats.count)) - {one.seat for one in there.values()}
        free = sorted(empty - self._barred.keys())
        if empty and not free:
            raise UnavailableError(
                f"only places of workers whose device was sick are free ({'; '.join(set(self._barred.values()))})",
                code="no_room",
            )
        if not free:
            raise UnavailableError(
                f"there are {len(there)} workers, the most that this machine shall have (cluster.max_workers)",
                code="no_room",
            )
        name = seat_name(next(self._numbers))
        try:
            self._supervisor.add(seats.worker(name, role, free[0]))
        except StartupError as error:
            raise UnavailableError(error.message, code="not_started") from error
        self._seated[name] = _Seated(free[0], role, self._unix_clock())
        return name

    def _there(self) -> dict[str, _Seated]:
        """Workers that run or are about to; a seat is free once its worker has ended."""
        names = {component.name for component in self._supervisor.components}
        self._seated = {name: one for name, one in self._seated.items() if name in names}
        self._reported &= names
        return self._seated


@asynccontextmanager
async def serving(cluster: LocalCluster, supervisor: Supervisor) -> AsyncIterator[None]:
    """Let the planner of the cluster's settings act while the block runs.

    Raises:
        StartupError: the socket cannot be made.
    """
    audit.configure(cluster.settings.log.audit_log, "launcher")
    service = ScalerService(cluster, supervisor)
    async with (
        served(service, cluster.settings.planner.scaler),
        background(service.follow_registry(), name="scaled-workers"),
    ):
        yield
