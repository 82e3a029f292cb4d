"""The dispatcher against a real control plane and real gRPC workers that follow a script."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY

from frontend.dispatch import open_dispatcher
from frontend.generation import TokenDelta
from frontend.worker_channels import Place
from planner.server import open_control_plane
from slipstream import grpc_channels
from slipstream.cli.explain import lines
from slipstream.errors import (
    ContextLengthError,
    DeadlineError,
    MigrationBudgetError,
    MigrationLimitError,
    ModelNotFoundError,
    NoWorkerError,
    SlipstreamError,
    UnavailableError,
    WorkerDrainingError,
    WorkerLostError,
)
from slipstream.settings import ControlPlaneSettings, Settings
from slipstream.v1.registry_pb2 import Role, WorkerState
from slipstream.v1.sampling_pb2 import FinishReason
from slipstream.v1.worker_pb2 import Handoff
from tests.support.scripted_cluster import PROMPT, a_request, scripted_cluster, tokens_of
from tests.support.scripted_worker import MODEL, Script, ScriptedWorker, expected_answer, until

ANSWER = expected_answer(len(PROMPT), 8)


class Counting:
    """How much a counter grew since this was made."""

    def __init__(self, name: str, **labels: str) -> None:
        self._name, self._labels = name, labels
        self._before = self._value()

    def grown(self) -> float:
        return self._value() - self._before

    def _value(self) -> float:
        return REGISTRY.get_sample_value(self._name, self._labels) or 0.0


def fallbacks(reason: str) -> Counting:
    return Counting("slipstream_frontend_fallbacks_total", reason=reason)


@pytest.fixture(autouse=True)
def no_request_is_left_open() -> Iterator[None]:
    yield
    assert REGISTRY.get_sample_value("slipstream_frontend_dispatched_requests") == 0


async def test_prompt_goes_through_prefill_and_the_handoff_reaches_decode() -> None:
    async with scripted_cluster() as cluster:
        deltas = await cluster.answer(a_request())
        assert tokens_of(deltas) == ANSWER
        assert deltas[-1].finish_reason == FinishReason.FINISH_REASON_LENGTH
        prefill, decode = cluster.prefills[0].seen.prefills[0], cluster.decodes[0].seen.decodes[0]
        assert decode.handoff == Handoff(
            id=prefill.handoff_id,
            worker_id="p0",
            sender=cluster.prefills[0].record.transfer,
            token=prefill.handoff_token,
        )
        assert len(prefill.handoff_token) == 32
        assert len(prefill.handoff_id) == 16
        account = deltas[-1].account
        assert account is not None
        assert (account.prefill_worker, account.decode_worker) == ("p0", "d0")
        assert (account.prompt_tokens, account.prefill_computed_tokens, account.prefill_cached_tokens) == (40, 39, 1)
        assert (account.decode_computed_tokens, account.kv_blocks_moved, account.transport) == (1, 4, "shm/direct")
        assert (account.attempts, account.fallback) == (1, "")
        assert account.prefill_s > 0
        # The prefill worker may let go of the blocks; the decode worker was not aborted.
        await cluster.until_idle()
        assert cluster.prefills[0].seen.cancelled == ["r1"]
        assert cluster.decodes[0].seen.completed == ["r1"]


async def test_the_first_and_the_last_delta_have_an_account_and_logprobs_pass_through() -> None:
    async with scripted_cluster() as cluster:
        cluster.decodes[0].script = Script(interval_s=0.02)
        deltas = await cluster.answer(a_request(logprobs=0))
        assert [delta.account is not None for delta in deltas] == [True] + [False] * 6 + [True]
        assert [delta.logprobs[0].chosen.token_id for delta in deltas] == ANSWER


async def test_blocks_are_released_with_the_first_token_not_with_the_last() -> None:
    async with scripted_cluster() as cluster:
        cluster.decodes[0].script = Script(hang_at=1)
        stream = cluster.dispatcher.generate(a_request())
        await anext(stream)
        await until(lambda: cluster.prefills[0].seen.cancelled == ["r1"])
        assert cluster.decodes[0].seen.open_calls == 1
        await stream.aclose()


async def test_both_workers_are_called_before_the_prompt_is_computed() -> None:
    async with scripted_cluster(prefill_timeout_s=10) as cluster:
        cluster.prefills[0].script = Script(hang_at=0)
        task = asyncio.create_task(cluster.answer(a_request()))
        await until(lambda: cluster.prefills[0].seen.prefills and cluster.decodes[0].seen.decodes)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_tokens_end_a_prefill_that_turned_out_not_to_be_needed() -> None:
    async with scripted_cluster() as cluster:
        cluster.prefills[0].script = Script(hang_at=0)
        cluster.decodes[0].script = Script(warm=True, hang_at=1)
        stream = cluster.dispatcher.generate(a_request())
        await anext(stream)
        await until(lambda: cluster.prefills[0].seen.cancelled == ["r1"])
        assert cluster.decodes[0].seen.open_calls == 1
        await stream.aclose()
        cluster.decodes[0].script = Script(warm=True)
        account = (await cluster.answer(a_request("r2")))[-1].account
        assert account is not None
        assert (account.prefill_worker, account.prefill_s, account.attempts, account.fallback) == ("", 0, 1, "")


async def test_what_goes_wrong_on_prefill_after_the_first_tokens_is_counted_and_nothing_else() -> None:
    failed = Counting("slipstream_frontend_worker_failures_total", role="prefill", kind="failed")
    redispatched = Counting("slipstream_migrations_total", stage="prefill", reason="failed")
    async with scripted_cluster() as cluster:
        cluster.prefills[0].script = Script(crash_at=0, delay_s=0.05)
        cluster.decodes[0].script = Script(warm=True, interval_s=0.05)
        deltas = await cluster.answer(a_request())
        assert tokens_of(deltas) == ANSWER
        assert deltas[-1].account is not None
        assert (deltas[-1].account.attempts, deltas[-1].account.fallback) == (1, "")
    assert (failed.grown(), redispatched.grown()) == (1, 0)


async def test_a_prefill_worker_lost_after_the_prompt_was_computed_is_decodes_business() -> None:
    async with scripted_cluster(prefill=1) as cluster:
        cluster.prefills[0].script = Script(die_computed=True)
        cluster.decodes[0].script = Script(delay_s=0.3)
        deltas = await cluster.answer(a_request())
        assert tokens_of(deltas) == ANSWER
        account = deltas[-1].account
        assert account is not None
        assert (account.attempts, account.prefill_worker, account.fallback) == (1, "p0", "")


async def test_the_limit_for_the_first_token_does_not_run_while_prefill_computes() -> None:
    async with scripted_cluster(first_token_timeout_s=0.4) as cluster:
        cluster.prefills[0].script = Script(delay_s=0.8)
        deltas = await cluster.answer(a_request())
        assert tokens_of(deltas) == ANSWER
        assert deltas[-1].account is not None
        assert deltas[-1].account.attempts == 1


@pytest.mark.parametrize(("say_after_s", "prefill_worker"), [(0.05, "p0"), (30.0, "")], ids=["late", "never"])
async def test_an_answer_of_one_token_has_prefills_figures_although_they_came_after_it(
    say_after_s: float, prefill_worker: str
) -> None:
    async with scripted_cluster() as cluster:
        cluster.prefills[0].script = Script(say_after_s=say_after_s)
        deltas = await cluster.answer(a_request(max_tokens=1))
        assert tokens_of(deltas) == ANSWER[:1]
        account = deltas[-1].account
        assert account is not None
        assert (account.prefill_worker, account.kv_blocks_moved) == (prefill_worker, 4)


async def test_every_attempt_has_a_handoff_of_its_own() -> None:
    async with scripted_cluster(decode=2) as cluster:
        for worker in cluster.decodes:
            worker.script = Script(end_at=0)
        with pytest.raises(WorkerLostError):
            await cluster.answer(a_request())
        handed = [request.handoff_id for request in cluster.prefills[0].seen.prefills]
        received = [one.seen.decodes[0].handoff.id for one in cluster.decodes]
        assert len(set(handed)) == 2
        # An engine refuses a name that it has, and may not have let go of the first attempt yet.
        assert [request.request_id for request in cluster.prefills[0].seen.prefills] == ["r1", "r1~2"]
        assert set(handed) == set(received)


async def test_a_prompt_of_one_token_goes_to_decode_alone_and_is_no_fallback() -> None:
    async with scripted_cluster() as cluster:
        deltas = await cluster.answer(a_request(token_ids=[7]))
        assert cluster.prefills[0].seen.prefills == []
        assert deltas[-1].account is not None
        assert deltas[-1].account.fallback == ""


async def test_a_prompt_of_a_hundred_thousand_tokens_passes() -> None:
    async with scripted_cluster() as cluster:
        prompt = [151_000] * 150_000
        assert tokens_of(await cluster.answer(a_request(token_ids=prompt))) == expected_answer(len(prompt), 8)


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


async def test_unknown_and_unserved_models_are_different_errors() -> None:
    async with scripted_cluster() as cluster:
        with pytest.raises(ModelNotFoundError):
            await cluster.answer(a_request(model="another"))
        cluster.decodes[0].set_state(WorkerState.DRAINING)
        await until(lambda: not cluster.dispatcher.ready)
        assert cluster.dispatcher.models() == []
        with pytest.raises(NoWorkerError, match="draining") as caught:
            await cluster.answer(a_request())
        assert caught.value.retry_after_s
        cluster.decodes[0].set_state(WorkerState.READY)
        await cluster.dispatcher.wait_ready(5)
        assert tokens_of(await cluster.answer(a_request())) == ANSWER


async def test_models_name_their_limits_and_workers() -> None:
    async with scripted_cluster(prefill=1, decode=2) as cluster:
        (model,) = cluster.dispatcher.models()
        assert (model.name, model.max_model_len, model.prefill_workers, model.decode_workers) == (MODEL, 4096, 1, 2)


async def test_a_frontend_without_a_control_plane_is_unavailable_not_wrong() -> None:
    settings = Settings(control_plane=ControlPlaneSettings(address="127.0.0.1:1"))
    async with open_dispatcher(settings) as dispatcher:
        assert not dispatcher.ready
        with pytest.raises(NoWorkerError, match="control plane"):
            await anext(dispatcher.generate(a_request()))
        with pytest.raises(DeadlineError):
            await dispatcher.wait_ready(0.2)


async def test_an_unreachable_worker_is_avoided_after_its_first_failure() -> None:
    async with scripted_cluster(decode=2) as cluster:
        await cluster.decodes[0].die()
        for index in range(4):
            assert tokens_of(await cluster.answer(a_request(f"r{index}"))) == ANSWER
        lost = Counting("slipstream_frontend_worker_failures_total", role="decode", kind="lost")
        await cluster.answer(a_request("again"))
        assert lost.grown() == 0


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


async def test_many_requests_at_once_are_spread_over_the_workers() -> None:
    async with scripted_cluster(prefill=2, decode=2) as cluster:
        for worker in cluster.decodes:
            worker.script = Script(interval_s=0.01)
        answers = await asyncio.gather(*(cluster.answer(a_request(f"r{index}")) for index in range(20)))
        assert all(tokens_of(deltas) == ANSWER for deltas in answers)
        assert [len(one.seen.decodes) for one in cluster.decodes] == [10, 10]
        assert [len(one.seen.prefills) for one in cluster.prefills] == [10, 10]


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
