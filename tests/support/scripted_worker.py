"""A worker without an engine: a real gRPC server that follows a script, registered with a real control plane.

It stands at the boundary where the frontend's knowledge ends, so that every way in which a worker can fail can
be had on demand. Its tokens are a function of their position, so that an answer that was continued on another
worker can be compared with one that was not.

`python -m tests.support.scripted_worker REGISTRY decode WORKER_ID` runs one in a process of its own, to be killed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack
from copy import copy
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc.aio

from engine.request_stream import RequestStream, serving
from slipstream.errors import SlipstreamError
from slipstream.grpc_channels import server_options
from slipstream.registration import Registration
from slipstream.v1.registry_pb2 import Capacity, Load, Role, TransferEndpoint, WorkerRecord, WorkerState
from slipstream.v1.sampling_pb2 import Candidate, FinishReason, RequestAccount, TokenLogprobs
from slipstream.v1.worker_pb2 import (
    DecodeCommands,
    DecodeEvent,
    DecodeEvents,
    DecodeRequest,
    HandoffClosed,
    PrefillCommands,
    PrefillEvent,
    PrefillEvents,
    PrefillRequest,
    PromptComputed,
)
from slipstream.v1.worker_pb2_grpc import (
    DecodeWorkerServicer,
    PrefillWorkerServicer,
    add_DecodeWorkerServicer_to_server,
    add_PrefillWorkerServicer_to_server,
)

Context = grpc.aio.ServicerContext[Any, Any]

MODEL = "scripted"
HOST_ID = "one-host"
DEFAULT_TOKENS = 8
BLOCK_TOKENS = 16


def token_at(position: int) -> int:
    """The token that every scripted worker generates at a position of prompt plus answer."""
    return 1000 + position * 7 % 500


def expected_answer(prompt_tokens: int, max_tokens: int) -> list[int]:
    return [token_at(prompt_tokens + index) for index in range(max_tokens)]


@dataclass(slots=True)
class Script:
    """What a worker does with each request. Counts are in tokens of one call.

    Attributes:
        refuse: ends each call with this error.
        hang_at: stops answering at this token (decode) or before the prompt is computed (prefill: 0), but stays
            connected.
        die_at: closes the server at this token (decode) or before the prompt is computed (prefill: 0).
        end_at: ends the call there with status OK, in the middle of the answer.
        finish_at: generates this many tokens although more were allowed.
        die_computed: closes the server right after it has said that the prompt is computed.
        say_after_s: how long after the prompt is computed its caller hears of it.
        warm: decode has the prompt's blocks and needs nothing from prefill.
        recompute_s: how long decode takes to compute a prompt whose handoff broke; None: it never does.
        cached: False: has nothing to hand over when asked for what is cached.
        say_finish: False leaves out the finish reason and waits, as if the last message had been lost.
    """

    refuse: SlipstreamError | None = None
    hang_at: int | None = None
    die_at: int | None = None
    end_at: int | None = None
    abort_at: int | None = None
    crash_at: int | None = None
    finish_at: int | None = None
    say_finish: bool = True
    interval_s: float = 0.0
    delay_s: float = 0.0
    die_computed: bool = False
    say_after_s: float = 0.0
    warm: bool = False
    recompute_s: float | None = None
    cached: bool = True
    fallback: str = ""


class Handoffs:
    """Stands for the transfer agents: what was handed over under which id, and what broke."""

    def __init__(self) -> None:
        self._tokens: dict[bytes, int | None] = {}
        self._changed = asyncio.Condition()

    async def settle(self, handoff_id: bytes, tokens: int | None) -> None:
        """So many tokens can be received under this id from now on; None: it broke. The first word counts."""
        async with self._changed:
            self._tokens.setdefault(handoff_id, tokens)
            self._changed.notify_all()

    async def receive(self, handoff_id: bytes) -> int | None:
        """Tokens that came, once they have; None when the handoff broke."""
        async with self._changed:
            await self._changed.wait_for(lambda: handoff_id in self._tokens)
            return self._tokens[handoff_id]


@dataclass(slots=True)
class Seen:
    """What a worker was asked, and which calls were aborted by the other side."""

    prefills: list[PrefillRequest] = field(default_factory=list)
    decodes: list[DecodeRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    traceparents: list[str] = field(default_factory=list)
    streams: int = 0
    open_calls: int = 0


class ScriptedWorker(PrefillWorkerServicer, DecodeWorkerServicer):
    """Serves and is registered while the context is entered; `script` may be changed at any time.

    Args:
        handoffs: shared by workers that can receive from each other; a worker without takes what it needs at once.
    """

    def __init__(
        self,
        registry_address: str,
        role: Role.ValueType,
        worker_id: str,
        *,
        script: Script | None = None,
        model: str = MODEL,
        host_id: str = HOST_ID,
        state: WorkerState.ValueType = WorkerState.READY,
        epoch: int = 1,
        handoffs: Handoffs | None = None,
    ) -> None:
        self.script = script or Script()
        self.prefill_script: Script | None = None  # for its prefill calls, if they shall not follow `script`
        self.handoffs = handoffs
        self.seen = Seen()
        self.record = WorkerRecord(
            worker_id=worker_id,
            role=role,
            state=state,
            model=model,
            host_id=host_id,
            epoch=epoch,
            device="cpu",
            capacity=Capacity(max_model_len=4096, block_tokens=BLOCK_TOKENS, blocks=1024, block_bytes=1024),
            load=Load(),
            # Nobody listens there: scripted workers hand over within this process.
            transfer=TransferEndpoint(address="127.0.0.1:9", epoch=epoch, transports=["shm", "ucx"]),
        )
        self._registry_address = registry_address
        self._server = grpc.aio.server(options=server_options())
        self._stack = AsyncExitStack()
        self._dying: asyncio.Task[None] | None = None
        self.registration = Registration(registry_address, lambda: self.record)

    @property
    def worker_id(self) -> str:
        return self.record.worker_id

    async def __aenter__(self) -> Self:
        add_PrefillWorkerServicer_to_server(self, self._server)
        if self.record.role == Role.ROLE_DECODE:
            add_DecodeWorkerServicer_to_server(self, self._server)
        self.record.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._stack.push_async_callback(self.die)
        await self._stack.enter_async_context(self.registration)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)
        if self._dying is not None:
            await self._dying

    def set_state(self, state: WorkerState.ValueType) -> None:
        self.record.state = state
        self.registration.push()

    async def die(self) -> None:
        """Close the server and every connection at once; the registration goes on as if nothing had happened."""
        await self._server.stop(None)

    async def PrefillMany(  # noqa: N802
        self, request_iterator: AsyncIterator[PrefillCommands], context: Context
    ) -> AsyncIterator[PrefillEvents]:
        def answer(request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]:
            self._note(request, context)
            self.seen.prefills.append(request)
            return self._watched(request.request_id, self._prefill(request))

        async with serving(RequestStream(answer, PrefillEvent), request_iterator, _for_ever) as messages:
            async for events in messages:
                yield PrefillEvents(events=events)

    async def DecodeMany(  # noqa: N802
        self, request_iterator: AsyncIterator[DecodeCommands], context: Context
    ) -> AsyncIterator[DecodeEvents]:
        def answer(request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
            self._note(request, context)
            self.seen.decodes.append(request)
            return self._watched(request.request_id, self._decode(request))

        self.seen.streams += 1
        stream = RequestStream(answer, DecodeEvent, merge_within_s=0)
        async with serving(stream, request_iterator, _for_ever) as messages:
            async for events in messages:
                yield DecodeEvents(events=events)

    def _note(self, request: PrefillRequest | DecodeRequest, context: Context) -> None:
        self.seen.peers.append(context.peer())
        self.seen.traceparents.append(request.trace.get("traceparent", ""))

    async def _prefill(self, request: PrefillRequest) -> AsyncIterator[PrefillEvent]:
        script = self.prefill_script or self.script
        try:
            if request.cached_only and not script.cached:
                yield PrefillEvent(closed=HandoffClosed(outcome=HandoffClosed.NOT_CACHED))
                return
            await self._misbehave(0, script)
            computed = await self._computed(request)
            await self._settle(request.handoff_id, len(request.token_ids))
            await asyncio.sleep(script.say_after_s)
            yield PrefillEvent(computed=computed)
            if script.die_computed:
                self._dying = asyncio.create_task(self.die())
            await asyncio.sleep(30)
            yield PrefillEvent(closed=HandoffClosed(outcome=HandoffClosed.EXPIRED))
        finally:
            await self._settle(request.handoff_id, None)

    async def _computed(self, request: PrefillRequest) -> PromptComputed:
        prompt = len(request.token_ids)
        if request.cached_only:
            return PromptComputed(computed_tokens=1, cached_tokens=prompt - 1)
        offered = None
        if request.HasField("source") and self.handoffs is not None:
            offered = await self.handoffs.receive(request.source.id)
        received = offered - 1 if offered else 0
        return PromptComputed(computed_tokens=prompt - received - 1, cached_tokens=1, received_tokens=received)

    async def _settle(self, handoff_id: bytes, tokens: int | None) -> None:
        if self.handoffs is not None:
            await self.handoffs.settle(handoff_id, tokens)

    async def _decode(self, request: DecodeRequest) -> AsyncIterator[DecodeEvent]:
        sampling, received = request.sampling, await self._receive(request)
        allowed = sampling.max_tokens if sampling.HasField("max_tokens") else DEFAULT_TOKENS
        count = allowed if self.script.finish_at is None else min(allowed, self.script.finish_at)
        for index in range(count):
            await self._misbehave(index)
            if self.script.end_at == index:
                return
            token = token_at(len(request.token_ids) + index)
            event = DecodeEvent(token_ids=[token])
            if sampling.HasField("logprobs"):
                event.logprobs.append(TokenLogprobs(chosen=Candidate(token_id=token, logprob=-0.5)))
            if self.script.abort_at == index:
                event.finish_reason = FinishReason.FINISH_REASON_ABORT
            elif index == count - 1 and self.script.say_finish:
                length = count == allowed
                event.finish_reason = FinishReason.FINISH_REASON_LENGTH if length else FinishReason.FINISH_REASON_STOP
                event.account.CopyFrom(self._account(request, received))
            yield event
            await asyncio.sleep(self.script.interval_s)
        await self._misbehave(count)

    async def _misbehave(self, position: int, script: Script | None = None) -> None:
        script = script or self.script
        if position == 0:
            await asyncio.sleep(script.delay_s)
        if script.refuse is not None:
            raise copy(script.refuse)
        if script.crash_at == position:
            raise RuntimeError("scripted crash of the handler")
        if script.die_at == position:
            self._dying = asyncio.create_task(self.die())
        if position in (script.die_at, script.hang_at):
            await asyncio.sleep(60)

    async def _receive(self, request: DecodeRequest) -> bool:
        """Whether the prompt's blocks came; without them it is computed here."""
        if not request.HasField("handoff") or self.script.warm:
            return False
        script = self.script
        misbehaves = script.refuse is not None or 0 in (script.hang_at, script.die_at, script.crash_at, script.end_at)
        if misbehaves or self.handoffs is None:
            return True  # whatever it does, it does at once
        if await self.handoffs.receive(request.handoff.id) is not None:
            return True
        await asyncio.sleep(60 if self.script.recompute_s is None else self.script.recompute_s)
        return False

    def _account(self, request: DecodeRequest, received: bool) -> RequestAccount:
        moved = 4 if received else 0
        broke = request.HasField("handoff") and not received and not self.script.warm
        return RequestAccount(
            prompt_tokens=len(request.token_ids),
            decode_computed_tokens=1 if received else len(request.token_ids),
            kv_blocks_moved=moved,
            kv_bytes_moved=moved * self.record.capacity.block_bytes,
            transport="shm/direct" if moved else "",
            fallback=self.script.fallback or ("transfer_worker_gone" if broke else ""),
        )

    async def _watched(self, request_id: str, events: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        self.seen.open_calls += 1
        try:
            async for event in events:
                yield event
            self.seen.completed.append(request_id)
        except (asyncio.CancelledError, GeneratorExit):
            self.seen.cancelled.append(request_id)
            raise
        finally:
            self.seen.open_calls -= 1


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def until(condition: Callable[[], object], *, limit_s: float = 5.0) -> None:
    """Wait for something that another task or process brings about; fails after `limit_s`."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - what is waited for may be in another process
            await asyncio.sleep(0.01)


async def _run(registry_address: str, role: str, worker_id: str) -> None:
    script = Script(interval_s=0.05)
    async with ScriptedWorker(registry_address, Role.Value(f"ROLE_{role.upper()}"), worker_id, script=script):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_run(*sys.argv[1:]))
