"""The calls that workers of both roles serve, over a real connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc.aio
import pytest

from engine.cache_feed import CacheFeed
from engine.host_process import _add_standard_services, _WorkerService
from engine.open_work import OpenWork
from slipstream.errors import InvalidRequestError, TransferError
from slipstream.grpc_errors import from_rpc_error
from slipstream.v1.registry_pb2 import TransferEndpoint, TransferPath, WorkerRecord
from slipstream.v1.worker_pb2 import GetStatusRequest, ProbePathRequest
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


@pytest.fixture
async def worker(engine: ProbingEngine) -> AsyncIterator[WorkerAsyncStub]:
    server = grpc.aio.server()
    feed = CacheFeed(engine, OpenWork(), model="m", epoch=1)  # type: ignore[arg-type]
    service = _WorkerService(lambda: WorkerRecord(worker_id="w"), engine, feed)  # type: ignore[arg-type]
    _add_standard_services(server, (), service)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield WorkerStub(channel)
    await server.stop(None)


async def test_a_worker_tells_how_it_is_now(worker: WorkerAsyncStub) -> None:
    assert await worker.GetStatus(GetStatusRequest()) == WorkerRecord(worker_id="w")


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
