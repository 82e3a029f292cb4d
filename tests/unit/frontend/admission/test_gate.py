"""The gate before a real dispatcher, with scripted workers behind real gRPC: what a client notices of admission."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from frontend.admission.accounts import AdmissionAccount
from frontend.admission.claim import Claim, Priority
from frontend.admission.cluster_room import room_of
from frontend.admission.gate import AdmissionGate
from frontend.admission.in_flight import ClusterRoom
from frontend.generation import ServedModel, TokenDelta, TokenRequest
from slipstream.errors import (
    DeadlineError,
    DeadlineUnreachableError,
    NoWorkerError,
    QueueFullError,
    ShedError,
    SlipstreamError,
)
from slipstream.settings import AdmissionSettings
from tests.support.scripted_cluster import PROMPT, ScriptedCluster, a_request, scripted_cluster, tokens_of
from tests.support.scripted_worker import Script, expected_answer, until

SLOW = Script(interval_s=0.02)
BATCH = Claim(Priority.BATCH)


def asks(request_id: str, claim: Claim = Claim(), **sampling: Any) -> TokenRequest:  # noqa: B008 - it is frozen
    return replace(a_request(request_id, **sampling), claim=claim)


@asynccontextmanager
async def gated(
    *, places: int = 1, timeout_s: float = 20.0, **settings: Any
) -> AsyncIterator[tuple[AdmissionGate, ScriptedCluster]]:
    """A gate before one prefill worker and one decode worker that computes `places` requests at the same time."""
    async with scripted_cluster() as cluster:
        cluster.decodes[0].record.capacity.max_running = places
        cluster.decodes[0].registration.push()
        await until(lambda: room_of(cluster.dispatcher.records()).places == places)
        gate = AdmissionGate(
            cluster.dispatcher,
            AdmissionSettings(**settings),
            request_timeout_s=timeout_s,
            room=lambda: room_of(cluster.dispatcher.records()),
        )
        yield gate, cluster
        assert len(gate.scheduler.queues) == 0
        assert gate.scheduler.in_flight.open == 0


async def answer(gate: AdmissionGate, request: TokenRequest) -> list[TokenDelta]:
    async with asyncio.timeout(20):
        return [delta async for delta in gate.generate(request)]


async def refusal(gate: AdmissionGate, request: TokenRequest) -> SlipstreamError:
    with pytest.raises(SlipstreamError) as caught:
        await answer(gate, request)
    return caught.value


def account(gate: AdmissionGate, request_id: str) -> AdmissionAccount:
    (found,) = gate.accounts.of(request_id)
    return found


def queued(gate: AdmissionGate) -> int:
    return len(gate.scheduler.queues)


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class AtOnce:
    """A dispatcher that has its answer ready."""

    ready = True

    def models(self) -> list[ServedModel]:
        return []

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((1,))


async def test_a_request_that_finds_room_passes_without_a_task_or_a_wait() -> None:
    gate = AdmissionGate(
        AtOnce(),
        AdmissionSettings(),
        request_timeout_s=5,
        room=lambda: ClusterRoom(prefill_workers=1, decode_workers=1),
    )
    before = asyncio.all_tasks()
    stream = gate.generate(asks("r1"))
    with pytest.raises(StopIteration) as first:
        anext(stream).__await__().__next__()  # runs until it waits for something: it does not
    assert first.value.value == TokenDelta((1,))
    assert asyncio.all_tasks() == before
    await stream.aclose()
    assert gate.scheduler.in_flight.open == 0


async def test_requests_beyond_the_workers_room_wait_and_are_answered_in_turn() -> None:
    async with gated(places=2) as (gate, cluster):
        cluster.decodes[0].script = SLOW
        tasks = [asyncio.create_task(answer(gate, asks(f"r{number}"))) for number in range(6)]
        await until(lambda: queued(gate) == 4)
        assert cluster.decodes[0].seen.open_calls <= 2
        assert [account(gate, f"r{one}").state for one in range(6)] == ["admitted"] * 2 + ["waiting"] * 4
        for deltas in await asyncio.gather(*tasks):
            assert tokens_of(deltas) == expected_answer(len(PROMPT), 8)
        assert [request.request_id for request in cluster.decodes[0].seen.decodes] == [f"r{one}" for one in range(6)]
        waited_s = [account(gate, f"r{one}").waited_s for one in range(6)]
        assert waited_s[:2] == [0.0, 0.0]
        assert 0 < waited_s[2] < waited_s[5]


async def test_a_realtime_request_goes_before_batch_requests_that_came_earlier() -> None:
    async with gated() as (gate, cluster):
        cluster.decodes[0].script = SLOW
        tasks = [asyncio.create_task(answer(gate, asks(f"b{number}", BATCH))) for number in range(3)]
        await until(lambda: queued(gate) == 2)
        tasks.append(asyncio.create_task(answer(gate, asks("urgent"))))
        await asyncio.gather(*tasks)
        assert [one.request_id for one in cluster.decodes[0].seen.decodes] == ["b0", "urgent", "b1", "b2"]


async def test_a_full_queue_refuses_with_the_predicted_wait_and_counts_it() -> None:
    labels = {"class": "realtime", "tenant": "default", "reason": "queue_overflow"}
    before = metric("slipstream_frontend_refused_total", **labels)
    async with gated(realtime_queue=1) as (gate, cluster):
        cluster.decodes[0].script = SLOW
        tasks = [asyncio.create_task(answer(gate, asks(f"r{number}"))) for number in range(2)]
        await until(lambda: queued(gate) == 1)
        error = await refusal(gate, asks("r2"))
        assert isinstance(error, QueueFullError)
        assert "1 of 1 realtime requests (admission.realtime_queue)" in error.message
        assert error.retry_after_s is not None
        assert error.retry_after_s >= 1
        assert (account(gate, "r2").state, account(gate, "r2").retry_after_s) == (error.code, error.retry_after_s)
        await asyncio.gather(*tasks)
    assert metric("slipstream_frontend_refused_total", **labels) == before + 1


async def test_a_realtime_request_takes_the_place_of_a_batch_request_in_a_full_queue() -> None:
    async with gated(queue=1) as (gate, cluster):
        cluster.decodes[0].script = SLOW
        running = asyncio.create_task(answer(gate, asks("r0")))
        await until(lambda: gate.scheduler.in_flight.open == 1)
        batch = asyncio.create_task(refusal(gate, asks("b0", BATCH)))
        await until(lambda: queued(gate) == 1)
        urgent = asyncio.create_task(answer(gate, asks("r1")))
        error = await batch
        assert isinstance(error, ShedError)
        assert error.retry_after_s is not None
        assert (account(gate, "b0").state, account(gate, "b0").service_class) == ("shed", "batch")
        assert account(gate, "b0").waited_s > 0
        assert len(tokens_of(await running)) == len(tokens_of(await urgent)) == 8


async def test_a_client_that_leaves_while_queued_leaves_nothing_behind() -> None:
    async with gated() as (gate, cluster):
        cluster.decodes[0].script = SLOW
        running = asyncio.create_task(answer(gate, asks("r0")))
        await until(lambda: gate.scheduler.in_flight.open == 1)
        leaving = asyncio.create_task(answer(gate, asks("gone")))
        last = asyncio.create_task(answer(gate, asks("r1")))
        await until(lambda: queued(gate) == 2)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert queued(gate) == 1
        assert account(gate, "gone").state == "left"
        assert len(tokens_of(await running)) == len(tokens_of(await last)) == 8
        assert [one.request_id for one in cluster.decodes[0].seen.decodes] == ["r0", "r1"]


async def test_a_client_that_leaves_in_the_middle_makes_room_for_the_next() -> None:
    async with gated() as (gate, cluster):
        cluster.decodes[0].script = Script(hang_at=1)
        stream = gate.generate(asks("r0"))
        await anext(stream)
        waiting = asyncio.create_task(answer(gate, asks("r1")))
        await until(lambda: queued(gate) == 1)
        cluster.decodes[0].script = Script()
        await stream.aclose()
        assert len(tokens_of(await waiting)) == 8


async def test_a_deadline_ends_the_wait() -> None:
    async with gated() as (gate, cluster):
        cluster.decodes[0].script = Script(hang_at=1)
        stream = gate.generate(asks("r0"))
        await anext(stream)
        error = await refusal(gate, asks("r1", Claim(timeout_s=0.3)))
        assert isinstance(error, DeadlineError)
        assert "0.3 s" in error.message
        assert account(gate, "r1").state == "deadline_exceeded"
        assert account(gate, "r1").waited_s >= 0.3
        assert queued(gate) == 0
        await stream.aclose()


async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    async with gated() as (gate, cluster):
        cluster.decodes[0].script = Script(hang_at=1)
        stream = gate.generate(asks("r0"))
        await anext(stream)
        waiting = [asyncio.create_task(answer(gate, asks(f"w{number}", max_tokens=200))) for number in range(20)]
        await until(lambda: queued(gate) == 20)
        error = await refusal(gate, asks("r1", Claim(timeout_s=0.5)))
        assert isinstance(error, DeadlineUnreachableError)
        assert error.retry_after_s is not None
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await stream.aclose()


async def test_a_batch_request_is_preempted_for_a_realtime_one_and_goes_on_where_it_was() -> None:
    before = metric("slipstream_frontend_preempted_total", tenant="default")
    async with gated(ttft_slo_s=0.1) as (gate, cluster):
        cluster.decodes[0].script = Script(interval_s=0.03)
        batch = asyncio.create_task(answer(gate, asks("b0", BATCH, max_tokens=40)))
        await until(lambda: gate.scheduler.in_flight.first_token_s)
        urgent = await answer(gate, asks("urgent"))
        assert not batch.done()
        assert tokens_of(urgent) == expected_answer(len(PROMPT), 8)
        deltas = await batch
        assert tokens_of(deltas) == expected_answer(len(PROMPT), 40)
        assert [bool(delta.finish_reason) for delta in deltas] == [False] * 39 + [True]
        cost = deltas[-1].account
        assert cost is not None
        assert (cost.prompt_tokens, cost.attempts) == (len(PROMPT), 2)
        assert (account(gate, "b0").state, account(gate, "b0").preemptions) == ("admitted", 1)
        assert account(gate, "b0").waited_s > 0
        first, second, third = cluster.decodes[0].seen.decodes
        assert [first.request_id, second.request_id, third.request_id] == ["b0", "urgent", "b0-1"]
        generated = len(third.token_ids) - len(PROMPT)
        assert 0 < generated < 40
        assert third.sampling.max_tokens == 40 - generated
        assert "b0" in cluster.decodes[0].seen.cancelled
    assert metric("slipstream_frontend_preempted_total", tenant="default") == before + 1


async def test_an_answer_that_could_not_go_on_elsewhere_is_not_preempted() -> None:
    async with gated(ttft_slo_s=0.05) as (gate, cluster):
        cluster.decodes[0].script = Script(interval_s=0.03)
        batch = asyncio.create_task(answer(gate, asks("b0", BATCH, max_tokens=15, seed=7, temperature=1.0)))
        await until(lambda: gate.scheduler.in_flight.first_token_s)
        urgent = asyncio.create_task(answer(gate, asks("urgent")))
        assert len(tokens_of(await batch)) == 15
        assert not urgent.done()
        await urgent
        assert [one.request_id for one in cluster.decodes[0].seen.decodes] == ["b0", "urgent"]


async def test_a_client_of_a_preempted_request_can_leave_while_it_waits() -> None:
    async with gated(ttft_slo_s=0.1) as (gate, cluster):
        cluster.decodes[0].script = Script(interval_s=0.03)
        batch = asyncio.create_task(answer(gate, asks("b0", BATCH, max_tokens=100)))
        await until(lambda: gate.scheduler.in_flight.first_token_s)
        urgent = asyncio.create_task(answer(gate, asks("urgent", max_tokens=20)))
        await until(lambda: any(one.request_id == "urgent" for one in cluster.decodes[0].seen.decodes))
        assert queued(gate) == 1
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert queued(gate) == 0
        assert len(tokens_of(await urgent)) == 20


async def test_without_workers_the_dispatchers_own_error_comes_through() -> None:
    async with scripted_cluster(decode=0, prefill=0) as cluster:
        gate = AdmissionGate(cluster.dispatcher, AdmissionSettings(), request_timeout_s=5, room=lambda: room_of(()))
        errors = [await refusal(gate, asks(f"r{number}")) for number in range(3)]
        assert all(isinstance(error, NoWorkerError) or error.code == "model_not_found" for error in errors)
        assert gate.scheduler.in_flight.open == 0
