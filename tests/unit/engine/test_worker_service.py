"""The calls that workers of both roles serve, over a real connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc.aio
import pytest

from engine.cache_feed import CacheFeed
from engine.open_work import OpenWork
from engine.worker_service import WorkerService, add_standard_services
from slipstream.errors import InvalidRequestError, TransferError, WorkerDrainingError
from slipstream.grpc_errors import from_rpc_error
from slipstream.v1.registry_pb2 import Role, TransferEndpoint, TransferPath, WorkerRecord, WorkerState
from slipstream.v1.worker_pb2 import GetStatusRequest, ProbePathRequest, SetFenceRequest, SetRoleRequest
from slipstream.v1.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from slipstream.v1.worker_pb2_grpc import WorkerAsyncStub

PEER = TransferEndpoint(address="h:1", epoch=3, transports=["shm"])


@dataclass(slots=True)
class ProbingEngine:
    failure: TransferError | None = None
    probed: list[tuple[str, TransferEndpoint, str]] = field(default_factory=list)

    def cache_changes(self) -> None:
        return None

    async def probe_path(self, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
        self.probed.append((worker_id, peer, transport))
        if self.failure is not None:
            raise self.failure
        return TransferPath(peer_worker_id=worker_id, peer_epoch=peer.epoch, transport="shm", bytes_per_s=1e9)


@pytest.fixture
def engine() -> ProbingEngine:
    return ProbingEngine()


@dataclass(slots=True)
class Host:
    """The record that the service tells, and what it makes of a new role."""

    record: WorkerRecord = field(default_factory=lambda: WorkerRecord(worker_id="w", role=Role.ROLE_DECODE, epoch=7))
    draining: bool = False

    def set_role(self, role: Role.ValueType) -> None:
        if self.draining:
            raise WorkerDrainingError("this worker is draining")
        self.record.role = role

    def set_fence(self, fenced: bool, because: str) -> None:
        if self.draining:
            raise WorkerDrainingError("this worker is draining")
        self.record.state = WorkerState.FENCED if fenced else WorkerState.READY
        self.record.health.fenced_because = because


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
async def worker(engine: ProbingEngine, host: Host) -> AsyncIterator[WorkerAsyncStub]:
    server = grpc.aio.server()
    feed = CacheFeed(engine, OpenWork(), model="m", epoch=1)  # type: ignore[arg-type]
    service = WorkerService(lambda: host.record, host.set_role, engine, feed, host.set_fence)  # type: ignore[arg-type]
    add_standard_services(server, (), service)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield WorkerStub(channel)
    await server.stop(None)


async def test_a_worker_tells_how_it_is_now(worker: WorkerAsyncStub, host: Host) -> None:
    assert await worker.GetStatus(GetStatusRequest()) == host.record


@pytest.mark.parametrize("epoch", [0, 7], ids=["whichever runs", "the one that is meant"])
async def test_a_worker_takes_the_role_it_is_given_and_says_so(worker: WorkerAsyncStub, host: Host, epoch: int) -> None:
    for role in (Role.ROLE_PREFILL, Role.ROLE_PREFILL, Role.ROLE_DECODE):
        assert (await worker.SetRole(SetRoleRequest(role=role, epoch=epoch))).role == role
        assert host.record.role == role


@pytest.mark.parametrize(
    ("request_", "param"),
    [(SetRoleRequest(), "role"), (SetRoleRequest(role=Role.ROLE_PREFILL, epoch=6), "epoch")],
    ids=["no role", "another incarnation"],
)
async def test_a_role_that_cannot_be_meant_is_refused(
    worker: WorkerAsyncStub, host: Host, request_: SetRoleRequest, param: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.SetRole(request_)
    assert from_rpc_error(caught.value).param == param
    assert host.record.role == Role.ROLE_DECODE


async def test_a_worker_that_is_about_to_end_keeps_its_role(worker: WorkerAsyncStub, host: Host) -> None:
    host.draining = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.SetRole(SetRoleRequest(role=Role.ROLE_PREFILL))
    assert isinstance(from_rpc_error(caught.value), WorkerDrainingError)


async def test_a_probe_measures_the_way_from_the_named_worker(worker: WorkerAsyncStub, engine: ProbingEngine) -> None:
    path = await worker.ProbePath(ProbePathRequest(worker_id="p", peer=PEER, transport="shm"))
    assert engine.probed == [("p", PEER, "shm")]
    assert (path.peer_worker_id, path.peer_epoch, path.bytes_per_s) == ("p", 3, 1e9)


async def test_a_probe_of_nobody_is_refused(worker: WorkerAsyncStub, engine: ProbingEngine) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.ProbePath(ProbePathRequest(worker_id="p"))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequestError)
    assert (error.param, engine.probed) == ("peer", [])


async def test_a_probe_that_fails_here_says_why(worker: WorkerAsyncStub, engine: ProbingEngine) -> None:
    engine.failure = TransferError("the transfer agent gave no answer in 60 s", code="timeout")
    with pytest.raises(grpc.aio.AioRpcError, match="no answer in 60 s") as caught:
        await worker.ProbePath(ProbePathRequest(worker_id="p", peer=PEER))
    assert from_rpc_error(caught.value).code == "timeout"


async def test_a_worker_is_fenced_says_why_and_is_let_free_again(worker: WorkerAsyncStub, host: Host) -> None:
    told = await worker.SetFence(SetFenceRequest(fenced=True, because="Xid 79", epoch=7))
    assert (told.state, told.health.fenced_because) == (WorkerState.FENCED, "Xid 79")
    assert (await worker.SetFence(SetFenceRequest())).state == WorkerState.READY


@pytest.mark.parametrize(
    ("request_", "code"),
    [(SetFenceRequest(fenced=True, epoch=6), "stale_epoch"), (SetFenceRequest(because="x" * 241), "invalid_value")],
    ids=["meant for another incarnation", "too long"],
)
async def test_what_is_no_fence_of_this_worker_is_refused(
    worker: WorkerAsyncStub, host: Host, request_: SetFenceRequest, code: str
) -> None:
    before = host.record.state
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await worker.SetFence(request_)
    error = from_rpc_error(raised.value)
    assert isinstance(error, InvalidRequestError)
    assert error.code == code
    assert host.record.state == before
