"""A request is forgotten with its end: its prompt and all that was decided for it wait for no collector.

The frontend has Python look for cycles seldom (`slipstream.cycle_collector`), so what is in one stays for
thousands of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from slipstream.client import Client
from slipstream.errors import InvalidRequestError, SlipstreamError, UnavailableError, WorkerLostError
from tests.support.garbage import left_to_the_collector
from tests.support.scripted_cluster import ScriptedCluster, a_request, scripted_cluster
from tests.support.scripted_worker import Script
from tests.unit.frontend.admission.test_gate import answer, asks, gated
from tests.unit.frontend.conftest import Faces

Act = Callable[[ScriptedCluster, str], Awaitable[None]]


async def whole(cluster: ScriptedCluster, request_id: str) -> None:
    await cluster.answer(a_request(request_id))


async def broken_off(cluster: ScriptedCluster, request_id: str) -> None:
    stream = cluster.dispatcher.generate(a_request(request_id))
    await anext(stream)
    await stream.aclose()


async def moved_in_the_middle(cluster: ScriptedCluster, request_id: str) -> None:
    for worker in cluster.decodes:
        worker.script = Script(interval_s=0.05)
    stream = cluster.dispatcher.generate(a_request(request_id))
    await anext(stream)
    for worker in cluster.decodes:
        worker.script = Script(abort_at=3 if worker.seen.open_calls else None)
    *_, last = [delta async for delta in stream]
    assert last.account is not None
    assert last.account.attempts == 2


async def without_prefill(cluster: ScriptedCluster, request_id: str) -> None:
    cluster.prefills[0].script = Script(hang_at=0)
    cluster.decodes[0].script = cluster.decodes[1].script = Script(warm=True)
    await cluster.answer(a_request(request_id))


async def refused_by_all(cluster: ScriptedCluster, request_id: str) -> None:
    for worker in cluster.decodes:
        worker.script = Script(refuse=UnavailableError("full"))
    with pytest.raises(UnavailableError):
        await cluster.answer(a_request(request_id))


async def at_fault_itself(cluster: ScriptedCluster, request_id: str) -> None:
    for worker in cluster.decodes:
        worker.script = Script(refuse=InvalidRequestError("temperature is below 0"))
    with pytest.raises(InvalidRequestError):
        await cluster.answer(a_request(request_id))


async def at_fault_says_prefill(cluster: ScriptedCluster, request_id: str) -> None:
    cluster.prefills[0].script = Script(refuse=InvalidRequestError("temperature is below 0"))
    for worker in cluster.decodes:
        worker.script = Script(hang_at=0)
    with pytest.raises(InvalidRequestError):
        await cluster.answer(a_request(request_id))


async def failed_too_often(cluster: ScriptedCluster, request_id: str) -> None:
    for worker in cluster.decodes:
        worker.script = Script(abort_at=3)
    with pytest.raises(WorkerLostError):
        await cluster.answer(a_request(request_id))


@pytest.mark.parametrize(
    "act",
    [
        *(whole, broken_off, moved_in_the_middle, without_prefill),
        *(refused_by_all, at_fault_itself, at_fault_says_prefill, failed_too_often),
    ],
)
async def test_the_dispatcher_forgets_a_request_with_its_end(act: Act) -> None:
    async with scripted_cluster(decode=2, max_attempts=2) as cluster:
        await act(cluster, "first")  # what is made once is made
        await cluster.until_idle()
        with left_to_the_collector() as left:
            for number in range(3):
                await act(cluster, f"r{number}")
            await cluster.until_idle()
            await asyncio.sleep(0.3)  # a prefill call has a moment more to say that it has computed
        assert not left


async def test_the_gate_forgets_a_request_that_waited_and_one_that_was_refused() -> None:
    async with gated(realtime_queue=2) as (gate, cluster):
        cluster.decodes[0].script = Script(interval_s=0.01)

        async def burst(name: str) -> int:
            asked = (answer(gate, asks(f"{name}{number}")) for number in range(6))
            return sum(isinstance(one, SlipstreamError) for one in await asyncio.gather(*asked, return_exceptions=True))

        assert await burst("first") > 0
        with left_to_the_collector() as left:
            assert await burst("r") > 0
            await cluster.until_idle()
            await asyncio.sleep(0.3)
        assert not left


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
async def test_the_http_face_forgets_a_request_with_its_end(http: httpx.AsyncClient, stream: bool, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body = {"model": "tiny", "stream": stream, **asked}
    (await http.post(path, json=body)).raise_for_status()
    with left_to_the_collector() as left:
        for _ in range(3):
            (await http.post(path, json=body)).raise_for_status()
    assert not left


@pytest.mark.parametrize("wrong", [{"model": "none"}, {"temperature": -1}, {"max_tokens": 10**6}, {"stop": 5}])
async def test_the_http_face_forgets_a_request_that_it_refuses(http: httpx.AsyncClient, wrong: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "x", **wrong}
    assert (await http.post("/v1/completions", json=body)).status_code in (400, 404)
    with left_to_the_collector() as left:
        for _ in range(3):
            await http.post("/v1/completions", json=body)
    assert not left


async def test_the_grpc_face_forgets_a_request_with_its_end(faces: Faces) -> None:
    with Client(faces.grpc) as client:
        await asyncio.to_thread(client.complete, "x")
        with left_to_the_collector() as left:
            for _ in range(3):
                await asyncio.to_thread(client.complete, "x")
        assert not left
