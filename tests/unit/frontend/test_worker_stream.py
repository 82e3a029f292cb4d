"""A frontend's end of its streams to workers, against scripted workers over real gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from frontend import worker_call, worker_stream
from frontend.worker_channels import WorkerChannels
from frontend.worker_failure import FailureKind, WorkerFailure, failure_of
from frontend.worker_stream import WorkerStreams
from planner.server import open_control_plane
from slipstream.errors import CancelledByClientError, RequestTooLargeError
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.sampling_pb2 import SamplingParams
from slipstream.v1.worker_pb2 import DecodeRequest
from tests.support.scripted_worker import Script, ScriptedWorker, expected_answer, until


@asynccontextmanager
async def one_worker(script: Script | None = None) -> AsyncIterator[tuple[WorkerStreams, ScriptedWorker]]:
    async with (
        open_control_plane(ControlPlaneSettings(port=0)) as plane,
        ScriptedWorker(plane.address, Role.ROLE_DECODE, "d0", script=script) as worker,
        WorkerChannels() as channels,
        WorkerStreams(channels, time.monotonic) as streams,
    ):
        yield streams, worker


def a_request(request_id: str = "r", max_tokens: int = 8, prompt: int = 3) -> DecodeRequest:
    return DecodeRequest(request_id=request_id, token_ids=[1] * prompt, sampling=SamplingParams(max_tokens=max_tokens))


async def whole(call: worker_call.DecodeCall) -> list[int]:
    tokens: list[int] = []
    async with asyncio.timeout(10):
        while True:
            event = await call.read()
            assert event is not None
            tokens += event.token_ids
            if event.finish_reason:
                return tokens


async def test_many_requests_are_one_stream_and_each_gets_its_own_tokens() -> None:
    async with one_worker(Script(interval_s=0.001)) as (streams, worker):
        calls = [streams.decode(worker.record, a_request(prompt=length), {}) for length in range(1, 40)]
        answers = await asyncio.gather(*map(whole, calls))
        assert answers == [expected_answer(length, 8) for length in range(1, 40)]
        assert worker.seen.streams == 1
        await until(lambda: worker.seen.open_calls == 0)
        assert worker.seen.cancelled == []


async def test_a_reader_that_is_slow_gets_what_came_meanwhile_at_once_and_holds_up_nobody() -> None:
    async with one_worker() as (streams, worker):
        slow, quick = (streams.decode(worker.record, a_request(), {}) for _ in range(2))
        assert await whole(quick) == expected_answer(3, 8)
        await until(lambda: worker.seen.open_calls == 0)
        first = await slow.read()
        assert first is not None
        assert len(first.token_ids) > 1
        rest = [] if first.finish_reason else await whole(slow)
        assert [*first.token_ids, *rest] == expected_answer(3, 8)


async def test_a_reader_that_is_much_too_slow_is_cut_off_and_its_request_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_call, "WAITING_TOKENS", 20)
    async with one_worker(Script(interval_s=0.001)) as (streams, worker):
        slow = streams.decode(worker.record, a_request("slow", max_tokens=1000), {})
        await until(lambda: worker.seen.cancelled == ["slow"])
        with pytest.raises(CancelledByClientError, match="more than 20 tokens"):
            await slow.read()
        assert await whole(streams.decode(worker.record, a_request(), {})) == expected_answer(3, 8)


async def test_a_broken_stream_fails_all_its_requests_and_the_next_request_opens_another() -> None:
    async with one_worker(Script(hang_at=1)) as (streams, worker):
        calls = [streams.decode(worker.record, a_request(), {}) for _ in range(3)]
        for call in calls:
            assert await call.read() is not None
        await worker.die()
        for call in calls:
            with pytest.raises(WorkerFailure) as caught:
                await call.read()
            assert (caught.value.worker.worker_id, caught.value.kind) == ("d0", FailureKind.LOST)
            call.end()
        late = streams.decode(worker.record, a_request(), {})
        with pytest.raises(WorkerFailure) as caught:
            await late.read()
        assert caught.value.kind is FailureKind.LOST


def test_a_stream_that_breaks_with_no_good_word_is_a_lost_worker_too() -> None:
    nothing = grpc.aio.Metadata()
    broken = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details="Internal error from Core")
    failure = failure_of(WorkerRecord(worker_id="d0"), worker_stream._cause(broken))
    assert (failure.kind, str(failure)) == (FailureKind.LOST, "Internal error from Core")


async def test_a_call_that_is_ended_is_aborted_and_the_others_go_on() -> None:
    async with one_worker(Script(interval_s=0.01)) as (streams, worker):
        ended, other = (streams.decode(worker.record, a_request(name), {}) for name in ("ended", "other"))
        assert await ended.read() is not None
        ended.end()
        ended.end()
        assert await whole(other) == expected_answer(3, 8)
        await until(lambda: worker.seen.open_calls == 0)
        assert (worker.seen.cancelled, worker.seen.completed) == (["ended"], ["other"])


async def test_a_read_has_a_deadline_of_its_own_and_a_token_moves_it() -> None:
    async with one_worker(Script(hang_at=2, interval_s=0.05)) as (streams, worker):
        call = streams.decode(worker.record, a_request(), {})
        for _ in range(2):
            call.expect_by(time.monotonic() + 0.5)
            assert await call.read() is not None
        call.expect_by(time.monotonic() + 0.1)
        with pytest.raises(TimeoutError):
            await call.read()
        call.end()


async def test_a_request_that_fits_into_no_message_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_stream, "MAX_MESSAGE_BYTES", worker_stream._ROOM_BYTES + 1000)
    async with one_worker() as (streams, worker):
        with pytest.raises(RequestTooLargeError):
            streams.decode(worker.record, a_request(prompt=2000), {})
        assert await whole(streams.decode(worker.record, a_request(), {})) == expected_answer(3, 8)


async def test_an_idle_stream_to_a_worker_that_is_gone_is_closed() -> None:
    async with one_worker(Script(hang_at=1)) as (streams, worker):
        call = streams.decode(worker.record, a_request(), {})
        assert await call.read() is not None
        await streams.retain(set())
        assert worker.seen.open_calls == 1
        call.end()
        await streams.retain(set())
        await until(lambda: worker.seen.open_calls == 0)
        assert await whole_of_new(streams, worker) == expected_answer(3, 8)
        assert worker.seen.streams == 2


async def whole_of_new(streams: WorkerStreams, worker: ScriptedWorker) -> list[int]:
    worker.script = Script()
    return await whole(streams.decode(worker.record, a_request(), {}))
