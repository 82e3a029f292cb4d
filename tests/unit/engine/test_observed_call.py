"""A worker's part of a trace and its stage times, as the real services report them over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog

from decode_worker.service import DecodeService
from engine.admission import Admission
from engine.observed_call import STAGE_S
from engine.protocol import EngineTimes, PromptComputed, TokensGenerated
from engine.worker_metrics import MetricsServer
from kv_transfer.board import Board
from kv_transfer.leases import LeaseTable
from prefill_worker.service import PrefillService
from slipstream import tracing
from slipstream.errors import ModelNotFoundError
from slipstream.settings import TracingSettings
from slipstream.v1.registry_pb2 import Capacity, Load, Role
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams
from slipstream.v1.worker_pb2 import DecodeRequest, Handoff, PrefillRequest
from slipstream.v1.worker_pb2_grpc import (
    add_DecodeWorkerServicer_to_server,
    add_PrefillWorkerServicer_to_server,
)
from tests.support import one_call
from tests.support.cluster import scrape
from tests.support.otlp_collector import Collector, collecting

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{TRACE_ID}-{PARENT}-01"}
REQUEST = {"request_id": "r1", "model": "tiny", "token_ids": [1, 2, 3]}


class TimedEngine:
    """Says when its stages were: one second each, the last of them a moment ago."""

    def __init__(self, account: RequestAccount | None = None) -> None:
        self.bound: dict[str, Any] = {}
        self.account = account or RequestAccount(prompt_tokens=3)
        now_s = time.monotonic()
        self.times = EngineTimes(now_s - 3, now_s - 2, now_s - 1, now_s)

    async def prefill(self, *arguments: Any, **named: Any) -> PromptComputed:
        return PromptComputed(2, 1, 0, self.times)

    async def decode(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        handoff: Handoff | None,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokensGenerated, None]:
        self.bound = structlog.contextvars.get_contextvars()
        yield TokensGenerated([7])
        yield TokensGenerated(
            [8], finish_reason=FinishReason.FINISH_REASON_LENGTH, account=self.account, times=self.times
        )

    def load(self) -> Load:
        return Load()

    def capacity(self) -> Capacity:
        return Capacity(blocks=10)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board.create(tmp_path, slots=16)
    yield board
    board.unlink()
    board.close()


@asynccontextmanager
async def serving(engine: TimedEngine, board: Board) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    leases, admission = LeaseTable(board, lease_s=30), Admission(limit=4)
    prefill = PrefillService(engine, leases, admission, model="tiny", lease_s=30)  # type: ignore[arg-type]
    add_PrefillWorkerServicer_to_server(prefill, server)
    add_DecodeWorkerServicer_to_server(DecodeService(engine, admission, model="tiny"), server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


def exporting(collector: Collector) -> Any:
    settings = TracingSettings(endpoint=collector.endpoint, export_every_s=0.05)
    return tracing.exporting(settings, service="slipstream-decode", instance="d0")


async def test_a_decode_that_got_its_blocks_waits_for_the_transfer_and_then_decodes(
    collector: Collector, board: Board
) -> None:
    account = RequestAccount(prompt_tokens=3, kv_blocks_moved=2, kv_bytes_moved=4096, transport="shm/direct")
    with exporting(collector):
        async with serving(TimedEngine(account), board) as channel:
            call = one_call.decode(channel, DecodeRequest(**REQUEST), CALLER)  # type: ignore[arg-type]
            assert [list(event.token_ids) async for event in call] == [[7], [8]]

    spans = {span.name: span for span in collector.until(4, trace_id=TRACE_ID)}
    assert spans.keys() == {"slipstream.v1.DecodeWorker/Decode", "transfer", "prefill", "decode"}
    root = spans.pop("slipstream.v1.DecodeWorker/Decode")
    assert (root.parent, root.service, root.instance) == (PARENT, "slipstream-decode", "d0")
    assert {span.parent for span in spans.values()} == {root.span_id}
    assert spans["transfer"].attributes["slipstream.kv.bytes"] == 4096
    assert spans["transfer"].attributes["slipstream.kv.transport"] == "shm/direct"
    for span in spans.values():
        assert (span.end_ns - span.start_ns) / 1e9 == pytest.approx(1.0, abs=0.01)


async def test_a_transfer_that_failed_says_why(collector: Collector, board: Board) -> None:
    account = RequestAccount(prompt_tokens=3, fallback="transfer_worker_gone")
    with exporting(collector):
        async with serving(TimedEngine(account), board) as channel:
            call = one_call.decode(channel, DecodeRequest(**REQUEST), CALLER)  # type: ignore[arg-type]
            assert len([event async for event in call]) == 2

    (transfer,) = [span for span in collector.until(4, trace_id=TRACE_ID) if span.name == "transfer"]
    assert transfer.failed == "transfer_worker_gone"


async def test_a_prefill_lasts_until_its_blocks_are_handed_over(collector: Collector, board: Board) -> None:
    with exporting(collector):
        async with serving(TimedEngine(), board) as channel:
            request = PrefillRequest(**REQUEST, handoff_id=bytes(16), handoff_token=bytes(32))  # type: ignore[arg-type]
            async with aclosing(one_call.prefill(channel, request, CALLER)) as call:  # type: ignore[type-var]
                event: Any = await anext(call)
                assert event.HasField("computed")
            # As a frontend ends it once decode's first tokens have come.

            found = await asyncio.to_thread(collector.until, 4, trace_id=TRACE_ID)
    spans = {span.name: span for span in found}
    assert spans.keys() == {"slipstream.v1.PrefillWorker/Prefill", "queue", "prefill", "transfer"}
    assert spans["prefill"].attributes["slipstream.tokens.computed"] == 2
    assert spans["transfer"].attributes["slipstream.outcome"] == "ended_by_caller"


async def test_whatever_is_logged_during_a_call_names_its_request_and_trace(collector: Collector, board: Board) -> None:
    engine = TimedEngine()
    with exporting(collector):
        async with serving(engine, board) as channel:
            call = one_call.decode(channel, DecodeRequest(**REQUEST), CALLER)  # type: ignore[arg-type]
            assert len([event async for event in call]) == 2

    assert engine.bound.items() >= {"request_id": "r1", "trace_id": TRACE_ID}.items()
    assert "request_id" not in structlog.contextvars.get_contextvars()


async def test_a_refusal_is_a_failed_span(collector: Collector, board: Board) -> None:
    with exporting(collector):
        async with serving(TimedEngine(), board) as channel:
            request = DecodeRequest(request_id="r1", model="another", token_ids=[1])
            with pytest.raises(ModelNotFoundError):
                await anext(one_call.decode(channel, request, CALLER))

    (span,) = collector.until(1, trace_id=TRACE_ID)
    assert span.failed == "model_not_found"


async def test_stages_are_measured_whether_or_not_anything_is_traced(board: Board) -> None:
    engine = TimedEngine()
    with MetricsServer("127.0.0.1", 0, Role.ROLE_DECODE, "d0", model="tiny") as metrics:
        metrics.watch(engine, board, Admission(limit=4), list)  # type: ignore[arg-type]
        STAGE_S.clear()
        async with serving(engine, board) as channel:
            call = one_call.decode(channel, DecodeRequest(**REQUEST))  # type: ignore[arg-type]
            assert len([event async for event in call]) == 2
        seen = scrape(metrics.url)

    for stage in ("queue", "prefill", "decode"):
        assert seen[f"slipstream_worker_stage_seconds_sum:{stage}"] == pytest.approx(1.0, abs=0.01)
        assert seen[f"vllm:request_{stage}_time_seconds_count:0:tiny"] == 1
    assert seen["vllm:kv_cache_usage_perc:0:tiny"] == seen["slipstream_worker_kv_usage_ratio"] == 0
    assert seen["vllm:prompt_tokens_by_source_total:0:tiny:local_compute"] == 0
