"""The control plane as its clients see it: over real gRPC, with real registrations and watches."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import planner.service
from planner.server import ControlPlane, open_control_plane
from planner.service import LOAD_INTERVAL_S
from slipstream.errors import InvalidRequestError, StartupError, UnavailableError
from slipstream.grpc_errors import from_rpc_error
from slipstream.registration import Registration
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.registry_pb2 import (
    DeregisterRequest,
    Health,
    HealthState,
    Load,
    RegisterRequest,
    TransferPath,
    WatchRequest,
    WorkerSet,
)
from slipstream.v1.registry_pb2 import WorkerState as State
from slipstream.v1.registry_pb2_grpc import RegistryStub
from tests.support.scripted_worker import until
from tests.unit.planner.test_registry import a_record

if TYPE_CHECKING:
    from slipstream.v1.registry_pb2_grpc import RegistryAsyncStub

LEASE_S = 1.0
Watch = grpc.aio.UnaryStreamCall[WatchRequest, WorkerSet]


@asynccontextmanager
async def a_plane(lease_s: float = LEASE_S, port: int = 0) -> AsyncIterator[tuple[ControlPlane, RegistryAsyncStub]]:
    async with (
        open_control_plane(ControlPlaneSettings(port=port, lease_s=lease_s)) as plane,
        grpc.aio.insecure_channel(plane.address) as channel,
    ):
        yield plane, RegistryStub(channel)


async def next_set(watch: Watch) -> WorkerSet:
    async with asyncio.timeout(5):
        return cast("WorkerSet", await watch.read())


async def set_where(watch: Watch, condition: Callable[[WorkerSet], object]) -> WorkerSet:
    async with asyncio.timeout(10):
        while not condition(workers := await next_set(watch)):
            pass
    return workers


def first_epoch(workers: WorkerSet) -> int:
    return workers.workers[0].epoch if workers.workers else 0


def ids(workers: WorkerSet) -> list[str]:
    return [record.worker_id for record in workers.workers]


async def test_a_watch_begins_with_the_whole_set_and_sees_workers_come_and_go() -> None:
    async with a_plane() as (plane, stub):
        await stub.Register(RegisterRequest(worker=a_record("a")))
        watch = stub.Watch(WatchRequest())
        assert ids(await next_set(watch)) in ([], ["a"])
        await stub.Register(RegisterRequest(worker=a_record("b")))
        await stub.Deregister(DeregisterRequest(worker_id="a", epoch=1))
        seen = await set_where(watch, lambda workers: ids(workers) == ["b"])
        assert (seen.lease_s, seen.registry_id) == (LEASE_S, plane.service.registry_id)


async def test_an_idle_watch_hears_a_set_each_lease_period_and_learns_that_the_registry_settled() -> None:
    async with a_plane() as (_, stub):
        watch = stub.Watch(WatchRequest())
        seen = [await next_set(watch) for _ in range(3)]
        assert not seen[0].settled
        assert seen[-1].settled


async def test_a_worker_that_falls_silent_disappears() -> None:
    async with a_plane() as (_, stub):
        await stub.Register(RegisterRequest(worker=a_record("silent")))
        watch = stub.Watch(WatchRequest())
        await set_where(watch, lambda workers: ids(workers) == ["silent"])
        await set_where(watch, lambda workers: not ids(workers))


async def test_changes_of_load_are_gathered_and_the_newest_arrives() -> None:
    async with a_plane(lease_s=60) as (_, stub):
        await stub.Register(RegisterRequest(worker=a_record("a")))
        watch = stub.Watch(WatchRequest())
        await set_where(watch, ids)
        began_s = asyncio.get_running_loop().time()
        for running in range(1, 101):
            await stub.Register(RegisterRequest(worker=a_record("a", load={"running": running})))
        sets = 1
        while (await next_set(watch)).workers[0].load.running < 100:
            sets += 1
        elapsed_s = asyncio.get_running_loop().time() - began_s
        assert sets <= 1 + elapsed_s / LOAD_INTERVAL_S


async def test_a_watch_of_identities_hears_of_workers_and_not_of_their_load_or_paths() -> None:
    async with a_plane(lease_s=30) as (_, stub):
        paths = [TransferPath(peer_worker_id="p", transport="shm")]
        health = Health(state=HealthState.SUSPECT)
        await stub.Register(
            RegisterRequest(worker=a_record(load=Load(running=1), renewals=1, paths=paths, health=health))
        )
        whole, identities = stub.Watch(WatchRequest()), stub.Watch(WatchRequest(identities=True))
        first = await set_where(identities, lambda workers: workers.workers)
        expected = a_record()
        expected.ClearField("load")
        assert list(first.workers) == [expected]
        for running in range(2, 5):
            record = a_record(load=Load(running=running), renewals=running, paths=paths)
            await stub.Register(RegisterRequest(worker=record))
            await set_where(whole, lambda workers: workers.workers and workers.workers[0].load.running == running)  # noqa: B023
        await stub.Register(RegisterRequest(worker=a_record(state=State.DRAINING)))
        following = await next_set(identities)
        assert [record.state for record in following.workers] == [State.DRAINING], "nothing was sent in between"
        whole.cancel()
        identities.cancel()


async def test_a_watch_of_identities_too_hears_a_set_often_enough_to_know_that_the_registry_lives() -> None:
    async with a_plane() as (_, stub):
        watch = stub.Watch(WatchRequest(identities=True))
        await next_set(watch)
        for renewals in range(1, 5):
            await stub.Register(RegisterRequest(worker=a_record(worker_id="busy", renewals=renewals)))
            async with asyncio.timeout(2 * LEASE_S):
                await next_set(watch)
        watch.cancel()


async def test_a_watcher_that_does_not_read_holds_up_nobody_and_gets_the_newest_set() -> None:
    async with a_plane(lease_s=60) as (_, stub):
        await asyncio.gather(
            *(stub.Register(RegisterRequest(worker=a_record(f"w{index}", model="m" * 250))) for index in range(400))
        )
        sleeping, reading = stub.Watch(WatchRequest()), stub.Watch(WatchRequest())
        await next_set(sleeping)
        for epoch in range(2, 12):
            await stub.Register(RegisterRequest(worker=a_record("w0", epoch)))
            await set_where(reading, lambda workers: first_epoch(workers) == epoch)  # noqa: B023 - called in this turn
        await set_where(sleeping, lambda workers: first_epoch(workers) == 11)


async def test_errors_of_a_record_reach_the_worker_typed() -> None:
    async with a_plane() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Register(RegisterRequest(worker=a_record("a", address="nowhere")))
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidRequestError)
        assert error.param == "address"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Deregister(DeregisterRequest(worker_id="\n"))
        assert isinstance(from_rpc_error(caught.value), InvalidRequestError)


async def test_a_record_of_megabytes_is_not_even_parsed() -> None:
    async with a_plane() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Register(RegisterRequest(worker=a_record("a", model="m" * 1_000_000)))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_watchers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner.service, "MAX_WATCHERS", 1)
    async with a_plane() as (plane, stub):
        first = stub.Watch(WatchRequest())
        await next_set(first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(WatchRequest()).read()
        assert isinstance(from_rpc_error(caught.value), UnavailableError)
        first.cancel()

        await until(lambda: plane.service.watchers == 0)
        assert await next_set(stub.Watch(WatchRequest()))


async def test_a_registration_pushes_its_state_renews_and_takes_its_leave() -> None:
    before = asyncio.all_tasks()
    async with a_plane(lease_s=30) as (plane, stub):
        record = a_record("w", state=State.STARTING)
        watch = stub.Watch(WatchRequest())
        async with Registration(plane.address, lambda: record) as registration:
            await until(lambda: registration.registered)
            record.state = State.READY
            registration.push()
            seen = await set_where(watch, lambda them: ids(them) and them.workers[0].state == State.READY)
            renewals = seen.workers[0].renewals
            await set_where(watch, lambda workers: workers.workers[0].renewals > renewals)
        await set_where(watch, lambda workers: not ids(workers))
    await until(lambda: not asyncio.all_tasks() - before)


async def test_a_registration_survives_an_outage_and_returns_within_the_settling_time() -> None:
    async with a_plane() as (plane, _):
        address = plane.address
    record = a_record("w")
    async with Registration(address, lambda: record) as registration:
        await asyncio.sleep(0.3)
        assert not registration.registered
        async with a_plane(port=int(address.rpartition(":")[2])) as (_, stub):
            watch = stub.Watch(WatchRequest())
            assert ids(await set_where(watch, ids)) == ["w"]
        await until(lambda: not registration.registered)


async def test_leaving_without_a_control_plane_is_quick_and_no_error() -> None:
    record = a_record("w")
    async with asyncio.timeout(3):
        async with Registration("127.0.0.1:1", lambda: record):
            await asyncio.sleep(0.1)


async def test_a_taken_port_is_named_with_its_remedy() -> None:
    async with a_plane() as (plane, _):
        port = int(plane.address.rpartition(":")[2])
        with pytest.raises(StartupError, match=rf"port {port} is in use.*control_plane\.port"):
            async with a_plane(port=port):
                pass


async def test_health_is_served_and_ends_with_the_server() -> None:
    async with a_plane() as (plane, _), grpc.aio.insecure_channel(plane.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "slipstream.v1.Registry"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_open_watches_do_not_delay_the_stop() -> None:
    async with a_plane(lease_s=30) as (plane, _):
        address = plane.address
        channel = grpc.aio.insecure_channel(address)
        watch = RegistryStub(channel).Watch(WatchRequest())
        await next_set(watch)
    async with asyncio.timeout(5):
        assert await watch.read() is grpc.aio.EOF
    await channel.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_stops_cleanly_on_a_signal_and_prints_nothing_on_stdout(number: signal.Signals) -> None:
    program = (
        "import asyncio; from planner.server import serve; from slipstream.settings import *;"
        "asyncio.run(serve(Settings(control_plane=ControlPlaneSettings(port=0), log=LogSettings(format='json'))))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            line = await process.stderr.readline()
            assert b"control_plane_listening" in line
            process.send_signal(number)
            stdout, stderr = await process.communicate()
        assert (process.returncode, stdout) == (0, b"")
        assert b"Traceback" not in stderr
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
