"""The dispatcher against a real control plane and real gRPC workers that follow a script: a request's way."""

from __future__ import annotations

import asyncio

import pytest

from frontend.dispatch import open_dispatcher
from slipstream.errors import DeadlineError, ModelNotFoundError, NoWorkerError, WorkerLostError
from slipstream.settings import ControlPlaneSettings, Settings
from slipstream.v1.registry_pb2 import WorkerState
from slipstream.v1.sampling_pb2 import FinishReason
from slipstream.v1.worker_pb2 import Handoff
from tests.support.scripted_cluster import PROMPT, a_request, scripted_cluster, tokens_of
from tests.support.scripted_worker import MODEL, Script, expected_answer, until
from tests.unit.frontend.dispatch.counting import Counting

ANSWER = expected_answer(len(PROMPT), 8)


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


async def test_many_requests_at_once_are_spread_over_the_workers() -> None:
    async with scripted_cluster(prefill=2, decode=2) as cluster:
        for worker in cluster.decodes:
            worker.script = Script(interval_s=0.01)
        answers = await asyncio.gather(*(cluster.answer(a_request(f"r{index}")) for index in range(20)))
        assert all(tokens_of(deltas) == ANSWER for deltas in answers)
        assert [len(one.seen.decodes) for one in cluster.decodes] == [10, 10]
        assert [len(one.seen.prefills) for one in cluster.prefills] == [10, 10]
