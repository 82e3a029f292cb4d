"""What goes past a frontend's checks: mad values that it passes on to vLLM, and messages straight to the workers.

Who holds the cluster's token or certificate is trusted to be a frontend, not to be sound. Whatever it sends, a worker
refuses it or serves it; its engine lives, and nothing is held afterwards.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from benchmarks import bad_bodies
from slipstream.client import Client
from slipstream.v1 import worker_pb2
from slipstream.v1.inference_pb2_grpc import InferenceStub
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.sampling_pb2 import SamplingParams
from slipstream.v1.worker_pb2 import DecodeCommands, DecodeRequest, Handoff, PrefillCommands, PrefillRequest
from slipstream.v1.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub, WorkerStub
from tests.support.cluster import Cluster, wait_for
from tests.support.tiny_model import MAX_MODEL_LEN, VOCAB_SIZE

ROLES = (Role.ROLE_PREFILL, Role.ROLE_DECODE)
CALLS = 60
PATIENCE_S = 60.0
HUGE = 2**32 - 1
HONEST = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
REFUSED = {code.value[0] for code in HONEST}
NOT_OURS = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


@pytest.fixture(autouse=True)
def unharmed(cluster: Cluster) -> Iterator[None]:
    """The same processes, in the same roles, with nothing held, answer the next request with what they said before."""
    before = {role: _who(cluster.worker(role)) for role in ROLES}
    with Client(cluster.grpc_target) as client:
        right = client.complete("How many", max_tokens=8, temperature=0, ignore_eos=True).token_ids
        yield
        wait_for("nothing is held", lambda: _nothing_held(cluster), timeout_s=20)
        assert {role: _who(cluster.worker(role)) for role in ROLES} == before
        assert client.complete("How many", max_tokens=8, temperature=0, ignore_eos=True).token_ids == right


def _who(worker: WorkerRecord) -> tuple[str, int, int]:
    return worker.worker_id, worker.epoch, worker.state


def _nothing_held(cluster: Cluster) -> bool:
    loads = [cluster.ask_worker(worker).load for worker in cluster.workers()]
    return not any(load.running or load.waiting or load.blocks_used or load.handoffs_held for load in loads)


async def test_mad_sampling_values_reach_a_real_engine_and_it_lives(cluster: Cluster) -> None:
    chance = random.Random(23)
    seen: Counter[grpc.StatusCode] = Counter()
    with grpc.insecure_channel(cluster.grpc_target) as channel:
        for _ in range(CALLS):
            request = bad_bodies.call(chance, "tiny")
            request.sampling.max_tokens = min(request.sampling.max_tokens or 4, 4)
            call = InferenceStub(channel).Generate(request, timeout=PATIENCE_S)
            with suppress(grpc.RpcError):
                await asyncio.to_thread(list, call)
            assert call.code() in (grpc.StatusCode.OK, *HONEST), call.details()
            seen[call.code()] += 1
    assert seen[grpc.StatusCode.OK] > 5
    assert seen[grpc.StatusCode.INVALID_ARGUMENT] > 5


def _mad_decode(chance: random.Random, call: int) -> DecodeRequest:
    sampling = SamplingParams()
    sampling.CopyFrom(bad_bodies.call(chance, "tiny").sampling)
    sampling.max_tokens = min(sampling.max_tokens, 4)  # as long as the context allows is honest, and takes too long
    request = DecodeRequest(request_id=f"hostile-{call}", model="tiny", call=call, sampling=sampling)
    request.token_ids.extend(chance.choice(([5] * 20, [], [VOCAB_SIZE], [HUGE], [5] * MAX_MODEL_LEN, [0])))
    match chance.randrange(6):
        case 0:
            request.cache_salt, request.frontend_id = "\0" * 3, "\u202e" * 500
        case 1:
            request.handoff.CopyFrom(_mad_handoff(chance))
        case 2:
            request.trace.update({"traceparent": "00-zz-\n", "x": "y" * 5000})
        case 3:
            request.request_id = chance.choice(("", "hostile", "\n" * 500))
        case 4:
            request.model = "nobody"
    return request


def _mad_handoff(chance: random.Random) -> Handoff:
    made = Handoff(
        id=chance.randbytes(chance.choice((0, 16, 200))), worker_id=chance.choice(("", "nobody", "x" * 3000))
    )
    made.token = chance.randbytes(chance.choice((0, 32)))
    sender = made.sender
    sender.address = chance.choice(("", "127.0.0.1:1", "nowhere", "127.0.0.1:99999", "[::1", "\0:1"))
    sender.public_key, sender.epoch = chance.randbytes(chance.choice((0, 32, 100))), chance.choice((0, 2**64 - 1))
    return made


def _mad_prefill(chance: random.Random, call: int) -> PrefillRequest:
    request = PrefillRequest(request_id=f"hostile-{call}", model="tiny", call=call)
    request.token_ids.extend(chance.choice(([5] * 20, [], [VOCAB_SIZE], [HUGE], [5] * MAX_MODEL_LEN, [0])))
    request.handoff_id = chance.randbytes(chance.choice((0, 16, 16, 16, 17)))
    request.handoff_token = chance.randbytes(chance.choice((0, 32, 32, 32)))
    request.receiver_key = chance.randbytes(chance.choice((0, 32, 1000)))
    request.cached_only = chance.random() < 0.3
    if chance.random() < 0.3:
        request.source.CopyFrom(_mad_handoff(chance))
    return request


async def _ends(stream: Any, command: Any, requests: list[Any]) -> Counter[str]:
    """How each call ended: `served`, `computed`, `closed`, or a failure's code; every one does.

    A prompt that was computed waits for who should fetch it: nobody will, so its call is cancelled.
    """
    open_calls, ends = {request.call for request in requests}, Counter[str]()
    said = asyncio.Queue[Any]()

    async def commands() -> AsyncIterator[Any]:
        yield command(start=requests)
        while open_calls:
            yield await said.get()

    async with asyncio.timeout(PATIENCE_S):
        answers = stream(commands())
        while open_calls:
            for event in (await answers.read()).events:
                end = _end_of(event)
                if end == "computed":
                    said.put_nowait(command(cancel=[event.call]))
                if end and event.call in open_calls:
                    open_calls.discard(event.call)
                    ends[end] += 1
        answers.cancel()
    return ends


def _end_of(event: Any) -> str:
    if event.HasField("failure"):
        assert event.failure.status in REFUSED, event.failure
        return str(event.failure.code)
    if isinstance(event, worker_pb2.PrefillEvent):
        return "closed" if event.HasField("closed") else "computed" if event.HasField("computed") else ""
    return "served" if event.finish_reason else ""


@pytest.mark.parametrize("role", ROLES)
async def test_mad_requests_straight_to_a_worker_are_refused_or_served(cluster: Cluster, role: Role.ValueType) -> None:
    chance = random.Random(24)
    decodes = [_mad_decode(chance, call) for call in range(CALLS)]
    prefills = [_mad_prefill(chance, call) for call in range(CALLS)]
    async with cluster.frontends_channel(cluster.worker(role)) as channel:
        decoded = await _ends(DecodeWorkerStub(channel).DecodeMany, DecodeCommands, decodes)
        prefilled = await _ends(PrefillWorkerStub(channel).PrefillMany, PrefillCommands, prefills)
    assert decoded.total() == prefilled.total() == CALLS
    assert decoded["served"] > 3
    assert len(prefilled) > 2


METHODS = (
    *("PrefillWorker/PrefillMany", "DecodeWorker/DecodeMany", "Worker/GetStatus", "Worker/ProbePath"),
    *("Worker/WatchCache", "Worker/SetRole", "Worker/SetFence"),
)


GARBAGE = (b"\x0a\x02\xc3\x28", b"\xff" * 9, b"\x1b" * 150, b"\x0a" * 50_000, b"\x08\x80")


async def test_garbage_straight_to_a_worker_is_no_crash_of_its_own(cluster: Cluster) -> None:
    seen = Counter[grpc.StatusCode]()
    async with cluster.frontends_channel(cluster.worker(Role.ROLE_DECODE)) as channel:
        for method in METHODS:
            for content in GARBAGE:
                opened: Any = channel.unary_stream(f"/slipstream.v1.{method}")
                call = opened(content, timeout=PATIENCE_S)
                try:
                    await call.read()  # some of it is a message, of fields that nobody knows
                except grpc.aio.AioRpcError as error:
                    seen[error.code()] += 1
                call.cancel()
    assert not {*NOT_OURS, grpc.StatusCode.DEADLINE_EXCEEDED} & set(seen), seen
    assert seen[grpc.StatusCode.INVALID_ARGUMENT] > len(METHODS)


async def test_orders_that_cannot_be_meant_are_refused(cluster: Cluster) -> None:
    async with cluster.frontends_channel(cluster.worker(Role.ROLE_DECODE)) as channel:
        stub = WorkerStub(channel)
        peer = _mad_handoff(random.Random(26)).sender
        wrong = (
            stub.SetRole(worker_pb2.SetRoleRequest(role=77)),  # type: ignore[arg-type]
            stub.SetRole(worker_pb2.SetRoleRequest(role=Role.ROLE_PREFILL, epoch=1)),
            stub.SetFence(worker_pb2.SetFenceRequest(fenced=True, because="\r\nforged line")),
            stub.SetFence(worker_pb2.SetFenceRequest(fenced=True, epoch=2**64 - 1)),
            stub.ProbePath(worker_pb2.ProbePathRequest()),
            stub.ProbePath(worker_pb2.ProbePathRequest(worker_id="x", peer=peer, transport="carrier pigeon")),
        )
        for call in wrong:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() not in NOT_OURS, caught.value.details()
