"""Decode workers that fail, before their first token or later, and how often a request may move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from frontend.generation import TokenDelta
from frontend.worker_channels import Place
from slipstream.cli.explain import lines
from slipstream.errors import (
    MigrationBudgetError,
    MigrationLimitError,
    SlipstreamError,
    UnavailableError,
    WorkerDrainingError,
    WorkerLostError,
)
from slipstream.v1.registry_pb2 import WorkerState
from slipstream.v1.sampling_pb2 import FinishReason
from tests.support.scripted_cluster import PROMPT, a_request, scripted_cluster, tokens_of
from tests.support.scripted_worker import Script, ScriptedWorker, expected_answer, until
from tests.unit.frontend.dispatch.counting import Counting

ANSWER = expected_answer(len(PROMPT), 8)


BEFORE_THE_FIRST_TOKEN = pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(refuse=WorkerDrainingError("draining")), WorkerDrainingError),
        (Script(refuse=UnavailableError("256 requests wait", code="queue_full")), UnavailableError),
        (Script(die_at=0), WorkerLostError),
        (Script(hang_at=0), WorkerLostError),
        (Script(end_at=0), WorkerLostError),
        (Script(abort_at=0), WorkerLostError),
        (Script(crash_at=0), SlipstreamError),
    ],
    ids=["draining", "queue_full", "dies", "hangs", "ends", "aborts", "crash"],
)


@BEFORE_THE_FIRST_TOKEN
async def test_a_decode_worker_that_fails_before_its_first_token_is_replaced(
    script: Script, error: type[SlipstreamError]
) -> None:
    async with scripted_cluster(decode=2, first_token_timeout_s=0.5) as cluster:
        first = await cluster.answer(a_request("warm-up"))
        assert first[-1].account is not None
        favourite = next(one for one in cluster.decodes if one.worker_id == first[-1].account.decode_worker)
        favourite.script = script
        deltas = await cluster.answer(a_request())
        assert tokens_of(deltas) == ANSWER
        account = deltas[-1].account
        assert account is not None
        assert account.decode_worker not in ("", favourite.worker_id)
        assert (account.prefill_worker, account.attempts) == ("p0", 2)


@BEFORE_THE_FIRST_TOKEN
async def test_without_another_decode_worker_the_client_is_told_to_come_back(
    script: Script, error: type[SlipstreamError]
) -> None:
    async with scripted_cluster(first_token_timeout_s=0.5, migration_wait_s=0.2) as cluster:
        cluster.decodes[0].script = script
        with pytest.raises(error) as caught:
            await cluster.answer(a_request())
        assert caught.value.retry_after_s


async def test_a_request_that_lost_its_worker_before_the_first_token_waits_for_one_to_come_back() -> None:
    async with waiting_for_its_worker(hang_at=0) as (worker, answering):
        worker.record.epoch += 1
        worker.registration.push()
        assert tokens_of(await answering) == ANSWER


@pytest.mark.parametrize(
    "script",
    [Script(die_at=3), Script(hang_at=3), Script(end_at=3), Script(abort_at=3), Script(crash_at=3)],
    ids=["dies", "hangs", "ends", "aborts", "crash"],
)
async def test_an_answer_goes_on_elsewhere_when_its_decode_worker_is_lost(script: Script) -> None:
    continued = Counting("slipstream_migration_resumptions_total", way="continued")
    async with scripted_cluster(decode=2, token_timeout_s=0.5) as cluster:
        stream = cluster.dispatcher.generate(a_request())
        for worker in cluster.decodes:
            worker.script = Script(interval_s=0.05)
        deltas = [await anext(stream)]
        hit = next(one for one in cluster.decodes if one.seen.decodes)
        other = next(one for one in cluster.decodes if one is not hit)
        hit.script = Script(
            die_at=script.die_at,
            hang_at=script.hang_at,
            end_at=script.end_at,
            abort_at=script.abort_at,
            crash_at=script.crash_at,
            interval_s=0.02,
        )
        async with asyncio.timeout(10):
            deltas += [delta async for delta in stream]
        assert tokens_of(deltas) == ANSWER
        resumed = other.seen.decodes[0]
        assert list(resumed.token_ids) == [*PROMPT, *ANSWER[:3]]
        assert resumed.sampling.max_tokens == 5
        assert deltas[-1].account is not None
        assert (deltas[-1].account.prompt_tokens, deltas[-1].account.attempts) == (40, 2)
    assert continued.grown() == 1


@pytest.mark.parametrize(
    ("sampling", "way"),
    [
        ({"seed": 1, "temperature": 0.7}, "replayed"),
        ({"presence_penalty": 0.5}, "replayed"),
        ({"presence_penalty": 0.5, "temperature": 0.7}, "approximated"),
        ({"frequency_penalty": 0.5}, "continued"),
        ({"repetition_penalty": 1.1}, "continued"),
        ({"min_tokens": 5}, "continued"),
        ({"min_tokens": 2}, "continued"),
    ],
)
async def test_an_answer_goes_on_in_the_way_that_its_sampling_needs(sampling: dict[str, Any], way: str) -> None:
    went_on = Counting("slipstream_migration_resumptions_total", way=way)
    async with scripted_cluster(decode=2) as cluster:
        cluster.decodes[1].set_state(WorkerState.DRAINING)
        await until(lambda: cluster.dispatcher.models()[0].decode_workers == 1)
        cluster.decodes[0].script = Script(die_at=3, interval_s=0.02)
        stream = cluster.dispatcher.generate(a_request(**sampling))
        deltas = [await anext(stream)]
        cluster.decodes[1].set_state(WorkerState.READY)
        await until(lambda: cluster.dispatcher.models()[0].decode_workers == 2)
        async with asyncio.timeout(10):
            deltas += [delta async for delta in stream]
        assert tokens_of(deltas) == ANSWER
        resumed = cluster.decodes[1].seen.decodes[0]
        again = way == "replayed"
        assert list(resumed.token_ids) == (PROMPT if again else [*PROMPT, *ANSWER[:3]])
        assert resumed.sampling.max_tokens == (8 if again else 5)
        assert resumed.sampling.min_tokens == max(0, sampling.get("min_tokens", 0) - 3)
        account = deltas[-1].account
        assert account is not None
        assert (account.attempts, account.migrations) == (2, 1)
        assert account.recomputed_tokens >= 3
        first, second = cluster.dispatcher.routing.decisions.of("r1")
        assert (first.after, first.resumes) == ("", 0)
        assert (second.after, second.resumes) == ("decode d0 lost", 3)
        assert "  sent again after: decode d0 lost, its client had 3 tokens" in lines(second)
    assert went_on.grown() == 1


async def test_an_answer_that_has_begun_waits_for_a_worker_to_come_back() -> None:
    gaps = Counting("slipstream_migration_gap_seconds_count", stage="answer")
    async with scripted_cluster(decode=2) as cluster:
        cluster.decodes[1].set_state(WorkerState.DRAINING)
        await until(lambda: cluster.dispatcher.models()[0].decode_workers == 1)
        cluster.decodes[0].script = Script(die_at=3)
        answering = asyncio.create_task(cluster.answer(a_request()))
        await asyncio.sleep(0.5)
        assert not answering.done()
        cluster.decodes[1].set_state(WorkerState.READY)
        assert tokens_of(await answering) == ANSWER
    assert gaps.grown() == 1


async def test_a_request_that_kills_whatever_works_on_it_is_not_sent_through_the_whole_pool() -> None:
    refused = Counting("slipstream_migrations_refused_total", reason="limit")
    async with scripted_cluster(prefill=0, decode=4, max_migrations=1) as cluster:
        for worker in cluster.decodes:
            worker.script = Script(die_at=2, interval_s=0.01)
        with pytest.raises(MigrationLimitError, match="max_migrations = 1") as caught:
            await cluster.answer(a_request())
        assert caught.value.code == "migration_limit"
        assert caught.value.retry_after_s is None
        assert sum(len(worker.seen.decodes) for worker in cluster.decodes) == 2
    assert refused.grown() == 1


async def test_when_too_many_requests_lose_their_workers_no_more_are_moved() -> None:
    async with scripted_cluster(prefill=0, decode=3, migration_share=0.0) as cluster:
        for worker in cluster.decodes:
            worker.script = Script(die_at=2, interval_s=0.01)
        with pytest.raises(MigrationBudgetError, match="migration_share = 0") as caught:
            await cluster.answer(a_request())
        assert caught.value.retry_after_s
        assert sum(len(worker.seen.decodes) for worker in cluster.decodes) == 1


async def test_a_worker_that_was_restarted_may_have_the_request_that_it_lost() -> None:
    async with waiting_for_its_worker(hang_at=3) as (worker, answering):
        worker.record.epoch += 1
        worker.registration.push()
        assert tokens_of(await answering) == ANSWER


async def test_a_worker_whose_connection_alone_broke_goes_on_with_the_request_once_it_is_seen_to_live() -> None:
    async with waiting_for_its_worker(hang_at=3) as (worker, answering):
        for _ in range(3):  # renewals of its registration
            worker.registration.push()
            await asyncio.sleep(0.1)
        assert tokens_of(await answering) == ANSWER
        assert len(worker.seen.decodes) == 2


@asynccontextmanager
async def waiting_for_its_worker(
    *, hang_at: int
) -> AsyncIterator[tuple[ScriptedWorker, asyncio.Task[list[TokenDelta]]]]:
    """A request that has so many tokens of the only decode worker, to which its connection has broken."""
    async with scripted_cluster(prefill=0) as cluster:
        worker = cluster.decodes[0]
        worker.script = Script(hang_at=hang_at)
        answering = asyncio.create_task(cluster.answer(a_request()))
        await until(lambda: worker.seen.open_calls)
        await asyncio.sleep(0.1)
        stream = cluster.dispatcher._around.streams._decode[Place.of(worker.record)]
        assert stream._open is not None
        stream._open.cancel()  # as if its connection had broken
        worker.script = Script()
        await asyncio.sleep(0.3)
        assert not answering.done()
        yield worker, answering


@pytest.mark.parametrize(
    ("sampling", "reason", "stop"),
    [
        ({}, FinishReason.FINISH_REASON_LENGTH, ""),
        ({"max_tokens": 20, "stop_token_ids": [ANSWER[-1]]}, FinishReason.FINISH_REASON_STOP, str(ANSWER[-1])),
    ],
    ids=["length", "stop"],
)
async def test_an_answer_that_was_complete_but_for_its_end_is_ended_not_continued(
    sampling: dict[str, Any], reason: int, stop: str
) -> None:
    async with scripted_cluster(decode=2) as cluster:
        for worker in cluster.decodes:
            worker.script = Script(say_finish=False, finish_at=8)
        deltas = await cluster.answer(a_request(**sampling))
        assert tokens_of(deltas) == ANSWER
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (reason, stop)
        assert deltas[-1].account is not None
        assert sum(len(worker.seen.decodes) for worker in cluster.decodes) == 1


async def test_attempts_are_limited() -> None:
    async with scripted_cluster(prefill=0, decode=4, max_attempts=2) as cluster:
        for worker in cluster.decodes:
            worker.script = Script(crash_at=0)
        with pytest.raises(SlipstreamError):
            await cluster.answer(a_request())
        assert sum(len(worker.seen.decodes) for worker in cluster.decodes) == 2
