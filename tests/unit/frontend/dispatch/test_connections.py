"""Connections that break, freeze or lead nowhere, and a control plane that is gone for a while."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import AsyncExitStack

import pytest

from frontend.dispatch import open_dispatcher
from planner.server import open_control_plane
from slipstream import grpc_channels
from slipstream.errors import WorkerLostError
from slipstream.settings import ControlPlaneSettings, Settings
from slipstream.v1.registry_pb2 import Role, WorkerState
from tests.support.scripted_cluster import PROMPT, a_request, scripted_cluster, tokens_of
from tests.support.scripted_worker import Script, ScriptedWorker, expected_answer, until
from tests.unit.frontend.dispatch.counting import Counting

ANSWER = expected_answer(len(PROMPT), 8)


async def test_an_unreachable_worker_is_avoided_after_its_first_failure() -> None:
    async with scripted_cluster(decode=2) as cluster:
        await cluster.decodes[0].die()
        for index in range(4):
            assert tokens_of(await cluster.answer(a_request(f"r{index}"))) == ANSWER
        lost = Counting("slipstream_frontend_worker_failures_total", role="decode", kind="lost")
        await cluster.answer(a_request("again"))
        assert lost.grown() == 0


async def test_a_restart_of_the_control_plane_loses_no_request() -> None:
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncExitStack())
        plane = await first.enter_async_context(open_control_plane(ControlPlaneSettings(port=0, lease_s=1.0)))
        for role, name in ((Role.ROLE_PREFILL, "p0"), (Role.ROLE_DECODE, "d0")):
            await stack.enter_async_context(ScriptedWorker(plane.address, role, name, script=Script(interval_s=0.001)))
        settings = Settings(control_plane=ControlPlaneSettings(address=plane.address))
        dispatcher = await stack.enter_async_context(open_dispatcher(settings))
        view = dispatcher._watch.view
        await until(lambda: [one.prefill_workers for one in dispatcher.models()] == [1])
        stop, outcomes = asyncio.Event(), list[tuple[list[int], str]]()

        async def keep_asking() -> None:
            while not stop.is_set():
                deltas = [delta async for delta in dispatcher.generate(a_request(f"r{len(outcomes)}"))]
                assert deltas[-1].account is not None
                outcomes.append((tokens_of(deltas), deltas[-1].account.fallback))

        asking = asyncio.create_task(keep_asking())
        await until(lambda: len(outcomes) > 3)
        await first.aclose()
        asked = len(outcomes)
        await asyncio.sleep(1.5)  # longer than a lease: nobody renewed
        assert len(outcomes) > asked
        port = int(plane.address.rpartition(":")[2])
        again = await stack.enter_async_context(open_control_plane(ControlPlaneSettings(port=port, lease_s=1.0)))
        await until(lambda: view.registry_id == again.service.registry_id)
        assert {record.worker_id for record in view.records()} == {"p0", "d0"}
        await until(lambda: view.settled)
        assert {record.worker_id for record in view.records()} == {"p0", "d0"}
        asked = len(outcomes)
        await until(lambda: len(outcomes) > asked + 3)
        stop.set()
        await asking
    assert all(outcome == (ANSWER, "") for outcome in outcomes)
    await until(lambda: not asyncio.all_tasks() - before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_decode_worker_that_is_killed_or_stopped_costs_no_token(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stopped process keeps its connections: only unanswered pings tell.
    monkeypatch.setattr(grpc_channels, "KEEPALIVE_TIME_S", 1.0)
    monkeypatch.setattr(grpc_channels, "KEEPALIVE_TIMEOUT_S", 0.5)
    async with scripted_cluster(decode=1) as cluster:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.scripted_worker", cluster.registry_address, "decode", "victim"
        )
        try:
            await until(lambda: cluster.dispatcher.models()[0].decode_workers == 2, limit_s=20)
            cluster.decodes[0].set_state(WorkerState.DRAINING)
            await until(lambda: cluster.dispatcher.models()[0].decode_workers == 1)
            stream = cluster.dispatcher.generate(a_request(max_tokens=20))
            deltas = [await anext(stream)]
            cluster.decodes[0].set_state(WorkerState.READY)
            await until(lambda: cluster.dispatcher.models()[0].decode_workers == 2)
            process.send_signal(number)
            async with asyncio.timeout(15):
                deltas += [delta async for delta in stream]
            assert tokens_of(deltas) == expected_answer(40, 20)
            assert deltas[-1].account is not None
            assert (deltas[-1].account.decode_worker, deltas[-1].account.attempts) == ("d0", 2)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_a_long_silence_on_a_healthy_call_does_not_cost_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_channels, "KEEPALIVE_TIME_S", 0.5)
    async with scripted_cluster() as cluster:
        cluster.decodes[0].script = Script(delay_s=6)
        await cluster.answer(a_request("silent"))
        cluster.decodes[0].script = Script()
        await cluster.answer(a_request("after"))
        first, second = cluster.decodes[0].seen.peers
        assert first == second, "the worker threw the frontend out for its pings"


async def test_a_peer_that_accepts_connections_but_never_answers_is_lost_within_the_connect_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_channels, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with scripted_cluster(prefill=0, migration_wait_s=0.2) as cluster:
            address = cluster.decodes[0].record.address
            cluster.decodes[0].record.address = f"127.0.0.1:{silent.getsockname()[1]}"
            cluster.decodes[0].registration.push()
            view = cluster.dispatcher._watch.view
            await until(lambda: view.records()[0].address != address)
            with pytest.raises(WorkerLostError):
                async with asyncio.timeout(5):
                    await cluster.answer(a_request())
