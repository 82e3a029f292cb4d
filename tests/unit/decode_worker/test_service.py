"""The decode service: what of a call reaches the engine, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest

from benchmarks.instant_worker import InstantEngine
from decode_worker.service import DecodeService
from engine.admission import Admission
from engine.protocol import TokensGenerated
from slipstream.background import background
from slipstream.v1.registry_pb2 import TransferEndpoint
from slipstream.v1.sampling_pb2 import FinishReason, SamplingParams
from slipstream.v1.worker_pb2 import DecodeRequest, Handoff
from slipstream.v1.worker_pb2_grpc import add_DecodeWorkerServicer_to_server
from tests.support import one_call


@dataclass(slots=True)
class OneTokenEngine:
    handoffs: list[Handoff | None] = field(default_factory=list)
    salts: list[str] = field(default_factory=list)

    async def decode(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        handoff: Handoff | None,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokensGenerated, None]:
        self.salts.append(cache_salt)
        self.handoffs.append(handoff)
        yield TokensGenerated([7], finish_reason=FinishReason.FINISH_REASON_LENGTH)


@asynccontextmanager
async def serving(engine: Any, **options: float) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a decode worker with this engine."""
    server = grpc.aio.server()
    add_DecodeWorkerServicer_to_server(DecodeService(engine, Admission(limit=1), model="tiny", **options), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.mark.parametrize(
    "handoff",
    [None, Handoff(id=bytes(16), worker_id="p", sender=TransferEndpoint(address="h:1", epoch=2))],
    ids=["alone", "handoff"],
)
async def test_the_engine_is_told_where_the_prompts_blocks_come_from_if_they_come(handoff: Handoff | None) -> None:
    engine = OneTokenEngine()
    async with serving(engine) as channel:
        request = DecodeRequest(request_id="r", model="tiny", token_ids=[1, 2], handoff=handoff, cache_salt="s")
        events = [event async for event in one_call.decode(channel, request)]
    assert (engine.handoffs, engine.salts) == ([handoff], ["s"])
    assert [list(event.token_ids) for event in events] == [[7]]


async def test_tokens_that_come_faster_than_anyone_reads_travel_together() -> None:
    engine = InstantEngine("d", 0.001)
    request = DecodeRequest(request_id="r", model="tiny", token_ids=[1], sampling=SamplingParams(max_tokens=10))
    async with serving(engine, merge_within_s=0.5) as channel, background(engine.run(), name="steps"):
        events = [event async for event in one_call.decode(channel, request)]
    assert [len(event.token_ids) for event in events] == [1, 9]
    assert events[-1].finish_reason == FinishReason.FINISH_REASON_LENGTH
