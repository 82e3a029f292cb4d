"""A worker's end of a frontend's stream: many requests, each for itself, and their events many to a message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from engine.admission import Admission
from engine.request_stream import RequestStream, serving
from slipstream.errors import WorkerDrainingError
from slipstream.v1.sampling_pb2 import FinishReason
from slipstream.v1.worker_pb2 import DecodeCommands, DecodeEvent, DecodeRequest
from tests.support.scripted_worker import until


class Worker:
    """Answers each request with as many tokens as its prompt has, the next one whenever `step` is called."""

    def __init__(self) -> None:
        self.commands: asyncio.Queue[DecodeCommands | None] = asyncio.Queue()
        self.admission = Admission(limit=100)
        self.aborted: list[int] = []
        self.running = 0
        self._step = asyncio.Event()

    def stream(self) -> RequestStream[DecodeRequest, DecodeEvent]:
        return RequestStream(self._answer, DecodeEvent, merge_within_s=0.01)

    async def said(self) -> AsyncIterator[DecodeCommands]:
        while (commands := await self.commands.get()) is not None:
            yield commands

    def start(self, *calls: int, tokens: int = 3) -> None:
        requests = [DecodeRequest(call=call, token_ids=range(tokens)) for call in calls]
        self.commands.put_nowait(DecodeCommands(start=requests))

    async def step(self) -> None:
        self._step.set()
        self._step = asyncio.Event()
        await asyncio.sleep(0)

    async def _answer(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
        with self.admission.admitted():
            self.running += 1
            try:
                if request.request_id == "crash":
                    raise ValueError("a slip of the worker")
                for index in request.token_ids[:-1]:
                    await self._step.wait()
                    yield DecodeEvent(token_ids=[index])
                await self._step.wait()
                yield DecodeEvent(token_ids=[99], finish_reason=FinishReason.FINISH_REASON_LENGTH)
            except (asyncio.CancelledError, GeneratorExit):
                self.aborted.append(request.call)
                raise
            finally:
                self.running -= 1


async def test_what_one_step_made_for_all_requests_is_one_message() -> None:
    worker = Worker()
    async with serving(worker.stream(), worker.said(), worker.admission.over) as messages:
        worker.start(1, 2, 3)
        await until(lambda: worker.running == 3)
        for tokens in ([0], [1], [99]):
            await worker.step()
            events = await anext(messages)
            assert {event.call: list(event.token_ids) for event in events} == dict.fromkeys((1, 2, 3), tokens)
        worker.commands.put_nowait(None)
        assert [events async for events in messages] == []
    assert worker.aborted == []


async def test_a_frontend_that_does_not_read_has_one_event_of_each_request_waiting() -> None:
    worker = Worker()
    async with serving(worker.stream(), worker.said(), worker.admission.over) as messages:
        worker.start(1, 2, tokens=50)
        await until(lambda: worker.running == 2)
        await worker.step()
        assert [list(event.token_ids) for event in await anext(messages)] == [[0], [0]]
        for _ in range(40):  # nobody asks for the next message
            await worker.step()
            await asyncio.sleep(0.001)
        events = await anext(messages)
        tokens = [list(event.token_ids) for event in events]
        assert len(events) <= 4
        assert sum(map(len, tokens)) == 80


async def test_cancelling_a_call_aborts_that_request_alone_and_one_that_has_ended_is_no_mistake() -> None:
    worker = Worker()
    async with serving(worker.stream(), worker.said(), worker.admission.over) as messages:
        worker.start(1, 2, tokens=1)
        await until(lambda: worker.running == 2)
        worker.commands.put_nowait(DecodeCommands(cancel=[1, 77]))
        await until(lambda: worker.aborted == [1])
        await worker.step()
        assert [event.call for event in await anext(messages)] == [2]


async def test_a_stream_that_breaks_aborts_all_its_requests() -> None:
    worker = Worker()
    async with serving(worker.stream(), worker.said(), worker.admission.over):
        worker.start(1, 2)
        await until(lambda: worker.running == 2)
    assert (sorted(worker.aborted), worker.admission.open_count) == ([1, 2], 0)


async def test_a_crash_is_the_failure_of_its_request_alone() -> None:
    worker = Worker()
    async with serving(worker.stream(), worker.said(), worker.admission.over) as messages:
        crashing = DecodeRequest(call=1, request_id="crash", token_ids=[1])
        worker.commands.put_nowait(DecodeCommands(start=[crashing]))
        worker.start(2, tokens=1)
        (failed,) = await anext(messages)
        assert (failed.call, failed.failure.code) == (1, "internal_error")
        assert "ValueError: a slip of the worker" in failed.failure.message
        await worker.step()
        assert [event.call for event in await anext(messages)] == [2]


async def test_a_draining_worker_refuses_what_comes_and_ends_the_stream_when_all_is_done() -> None:
    worker = Worker()
    async with serving(worker.stream(), worker.said(), worker.admission.over) as messages:
        worker.start(1, tokens=1)
        await until(lambda: worker.running == 1)
        worker.admission.drain()
        worker.start(2)
        (refused,) = await anext(messages)
        assert (refused.call, refused.failure.code) == (2, WorkerDrainingError.default_code)
        await worker.step()
        assert [event.call for event in await anext(messages)] == [1]
        worker.admission.close()
        async with asyncio.timeout(5):
            assert [events async for events in messages] == []


async def test_a_call_begun_twice_runs_once_and_ends_with_its_stream() -> None:
    worker = Worker()
    async with serving(worker.stream(), worker.said(), worker.admission.over):
        worker.start(1, 1, 1)
        await until(lambda: worker.running == 1)
        await asyncio.sleep(0.02)
        assert worker.running == 1
    assert worker.running == 0
