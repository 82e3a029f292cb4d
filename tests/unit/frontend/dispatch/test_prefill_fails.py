"""Prefill workers that are not there, fail or say nothing: others compute the prompt, in the end decode itself."""

from __future__ import annotations

import asyncio
import time

import pytest

from slipstream.errors import SlipstreamError, UnavailableError, WorkerDrainingError
from slipstream.v1.registry_pb2 import WorkerState
from tests.support.scripted_cluster import PROMPT, a_request, scripted_cluster, tokens_of
from tests.support.scripted_worker import Script, expected_answer, until
from tests.unit.frontend.dispatch.counting import Counting, fallbacks

ANSWER = expected_answer(len(PROMPT), 8)


async def test_without_a_prefill_worker_decode_does_it_alone_and_says_so() -> None:
    counted = fallbacks("no_prefill_worker")
    async with scripted_cluster(prefill=0) as cluster:
        deltas = await cluster.answer(a_request())
        assert tokens_of(deltas) == ANSWER
        assert deltas[-1].account is not None
        assert deltas[-1].account.fallback == "no_prefill_worker"
        assert deltas[-1].account.prefill_worker == ""
        assert not cluster.decodes[0].seen.decodes[0].HasField("handoff")
    assert counted.grown() == 1


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(refuse=WorkerDrainingError("draining")), "prefill_refused"),
        (Script(refuse=UnavailableError("256 requests wait", code="queue_full")), "prefill_refused"),
        (Script(refuse=SlipstreamError("the engine broke")), "prefill_failed"),
        (Script(crash_at=0), "prefill_failed"),
        (Script(die_at=0), "prefill_lost"),
        (Script(hang_at=0), "prefill_timeout"),
    ],
    ids=["draining", "queue_full", "internal", "crash", "dies", "hangs"],
)
async def test_a_failed_prefill_worker_is_replaced_and_in_the_end_decode_does_it(script: Script, reason: str) -> None:
    counted = fallbacks(reason)
    async with scripted_cluster(prefill=2, prefill_timeout_s=0.5) as cluster:
        first = await cluster.answer(a_request("warm-up"))
        assert first[-1].account is not None
        favourite = next(one for one in cluster.prefills if one.worker_id == first[-1].account.prefill_worker)
        favourite.script = script
        deltas = await cluster.answer(a_request("one-fails"))
        assert tokens_of(deltas) == ANSWER
        account = deltas[-1].account
        assert account is not None
        assert account.prefill_worker not in ("", favourite.worker_id)
        assert (account.attempts, account.fallback) == (2, "")
        assert counted.grown() == 0

        for worker in cluster.prefills:
            worker.script = script
            cluster.dispatcher._watch.view.absolve(worker.worker_id)
        deltas = await cluster.answer(a_request("both-fail"))
        assert tokens_of(deltas) == ANSWER
        account = deltas[-1].account
        assert account is not None
        assert (account.prefill_worker, account.attempts, account.fallback) == ("", 3, reason)
        assert counted.grown() == 1


async def test_decode_does_it_alone_when_prefill_uses_up_the_attempts() -> None:
    async with scripted_cluster(prefill=2, max_attempts=1) as cluster:
        for worker in cluster.prefills:
            worker.script = Script(crash_at=0)
        deltas = await cluster.answer(a_request())
        assert deltas[-1].account is not None
        assert (deltas[-1].account.attempts, deltas[-1].account.fallback) == (2, "prefill_failed")
        assert sum(len(worker.seen.prefills) for worker in cluster.prefills) == 1


async def test_a_transfer_that_failed_on_the_decode_side_is_counted() -> None:
    counted = fallbacks("decode_recomputed")
    async with scripted_cluster() as cluster:
        cluster.decodes[0].script = Script(fallback="transfer_timeout")
        deltas = await cluster.answer(a_request())
        assert deltas[-1].account is not None
        assert deltas[-1].account.fallback == "transfer_timeout"
    assert counted.grown() == 1


async def test_a_prompt_leaves_a_prefill_worker_that_is_not_seen_to_compute_long_before_its_limit() -> None:
    moved = Counting("slipstream_migrations_total", stage="prefill", reason="silent")
    async with scripted_cluster(prefill=2, prefill_timeout_s=60, prefill_silence_s=0.3) as cluster:
        signs = cluster.dispatcher._around.signs
        for worker in cluster.prefills:
            signs.begins(worker.worker_id, time.monotonic())
        cluster.prefills[1].set_state(WorkerState.DRAINING)
        await until(lambda: cluster.dispatcher.models()[0].prefill_workers == 1)
        cluster.prefills[0].script = Script(hang_at=0)
        answering = asyncio.create_task(cluster.answer(a_request()))
        await until(lambda: cluster.prefills[0].seen.prefills)
        for _ in range(8):  # as long as it fills blocks it is waited for
            signs.computed("p0", time.monotonic())
            await asyncio.sleep(0.1)
        assert moved.grown() == 0
        cluster.prefills[1].set_state(WorkerState.READY)
        deltas = await answering
        assert tokens_of(deltas) == ANSWER
        account = deltas[-1].account
        assert account is not None
        assert (account.prefill_worker, account.attempts, account.migrations, account.fallback) == ("p1", 2, 0, "")
    assert moved.grown() == 1


async def test_a_prefill_worker_that_does_not_tell_what_it_caches_has_its_whole_time() -> None:
    async with scripted_cluster(prefill_silence_s=0.1) as cluster:
        cluster.prefills[0].script = Script(delay_s=0.5)
        account = (await cluster.answer(a_request()))[-1].account
        assert account is not None
        assert account.attempts == 1
