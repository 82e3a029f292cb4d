"""The decode service: what of a call reaches the engine, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import grpc.aio
import pytest

from decode_worker.service import DecodeService
from engine.admission import Admission
from engine.protocol import TokensGenerated
from slipstream.v1.registry_pb2 import TransferEndpoint
from slipstream.v1.sampling_pb2 import FinishReason, SamplingParams
from slipstream.v1.worker_pb2 import DecodeRequest, Handoff
from slipstream.v1.worker_pb2_grpc import DecodeWorkerStub, add_DecodeWorkerServicer_to_server


@dataclass(slots=True)
class OneTokenEngine:
    handoffs: list[Handoff | None] = field(default_factory=list)

    async def decode(
        self, request_id: str, token_ids: Sequence[int], sampling: SamplingParams, handoff: Handoff | None
    ) -> AsyncGenerator[TokensGenerated, None]:
        self.handoffs.append(handoff)
        yield TokensGenerated([7], finish_reason=FinishReason.FINISH_REASON_LENGTH)


@pytest.mark.parametrize(
    "handoff",
    [None, Handoff(id=bytes(16), worker_id="p", sender=TransferEndpoint(address="h:1", epoch=2))],
    ids=["alone", "handoff"],
)
async def test_the_engine_is_told_where_the_prompts_blocks_come_from_if_they_come(handoff: Handoff | None) -> None:
    engine, server = OneTokenEngine(), grpc.aio.server()
    service = DecodeService(engine, Admission(limit=1), model="tiny")  # type: ignore[arg-type]
    add_DecodeWorkerServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = DecodeRequest(request_id="r", model="tiny", token_ids=[1, 2], handoff=handoff)
        events = [event async for event in DecodeWorkerStub(channel).Decode(request)]
    await server.stop(None)
    assert engine.handoffs == [handoff]
    assert [list(event.token_ids) for event in events] == [[7]]
