"""What ends a request from outside: its deadline, its client, a worker that finds it wrong."""

from __future__ import annotations

import asyncio

import pytest

from slipstream.errors import ContextLengthError, DeadlineError
from tests.support.scripted_cluster import a_request, scripted_cluster
from tests.support.scripted_worker import Script, ScriptedWorker, until


@pytest.mark.parametrize("role", ["prefills", "decodes"])
async def test_a_request_that_a_worker_finds_wrong_is_not_tried_elsewhere(role: str) -> None:
    async with scripted_cluster(prefill=2, decode=2) as cluster:
        workers: list[ScriptedWorker] = getattr(cluster, role)
        for worker in workers:
            worker.script = Script(refuse=ContextLengthError("40 + 8 tokens do not fit 32", param="messages"))
        with pytest.raises(ContextLengthError, match=r"40 \+ 8 tokens do not fit 32") as caught:
            await cluster.answer(a_request())
        assert caught.value.param == "messages"
        assert sum(len(one.seen.prefills if role == "prefills" else one.seen.decodes) for one in workers) == 1


async def test_the_whole_request_has_a_deadline() -> None:
    async with scripted_cluster(request_timeout_s=0.5) as cluster:
        cluster.decodes[0].script = Script(hang_at=2)
        with pytest.raises(DeadlineError, match="request_timeout_s"):
            await cluster.answer(a_request())


async def test_cancelling_while_prefill_computes_aborts_both() -> None:
    async with scripted_cluster() as cluster:
        cluster.prefills[0].script = Script(hang_at=0)
        task = asyncio.create_task(cluster.answer(a_request()))
        await until(lambda: all(worker.seen.open_calls for worker in cluster.workers))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: [one.seen.cancelled for one in cluster.workers] == [["r1"], ["r1"]], limit_s=1)


async def test_cancelling_while_decode_is_silent_aborts_both() -> None:
    async with scripted_cluster() as cluster:
        cluster.decodes[0].script = Script(hang_at=0)
        task = asyncio.create_task(cluster.answer(a_request()))
        await until(lambda: cluster.decodes[0].seen.open_calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: [one.seen.cancelled for one in cluster.workers] == [["r1"], ["r1"]], limit_s=1)


@pytest.mark.parametrize("received", [0, 1, 4])
async def test_closing_the_stream_between_tokens_aborts_decode(received: int) -> None:
    async with scripted_cluster() as cluster:
        cluster.decodes[0].script = Script(interval_s=0.05)
        stream = cluster.dispatcher.generate(a_request())
        for _ in range(received):
            await anext(stream)
        await stream.aclose()
        await cluster.until_idle()
        assert cluster.decodes[0].seen.cancelled == (["r1"] if received else [])
