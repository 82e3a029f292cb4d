"""The simulated engine behind the Engine protocol: the scheduler, run by the real clock.

It serves as vLLM does, tokens and transfers and all, and takes the time that its profile says; nothing is computed.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from engine.protocol import CacheChange, PromptComputed, TokensGenerated
from engine.simulated.clock import Clock
from engine.simulated.held import HeldPrompts
from engine.simulated.profile_choice import profile_of
from engine.simulated.receiving import ReceivingSide
from engine.simulated.request import Event, EventKind, Request, Stage, Step
from engine.simulated.scheduler import Scheduler
from engine.simulated.sending import TRANSPORT, Outgoing, SendingSide
from engine.simulated.stream import Moved, Stream
from engine.simulated.tokens import Answer, printable_tokens, vocabulary_size
from kv_transfer.accounts import FAILURES, REFUSED
from kv_transfer.board import Board, Counter, Outcome
from kv_transfer.door import Door
from kv_transfer.handoff import Handoff as Place
from kv_transfer.handoff import check, digest_tokens
from kv_transfer.identity import Identity, Peers
from kv_transfer.permits import Permit
from slipstream import telemetry
from slipstream.background import background
from slipstream.block_keys import extend, root_key
from slipstream.errors import EngineDeadError, InvalidRequestError, TransferError
from slipstream.performance import Profile
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Capacity, Load, TransferEndpoint, TransferPath
from slipstream.v1.sampling_pb2 import FinishReason, SamplingParams
from slipstream.v1.worker_pb2 import Handoff

log = telemetry.get_logger(__name__)

# As in engine.vllm_engine: how long a prompt waits for a worker that should have blocks of it.
_SOURCE_PATIENCE_S = 2.0


@asynccontextmanager
async def running(
    settings: Settings, *, folder: Path, served_name: str, board: Board
) -> AsyncIterator[SimulatedEngine]:
    """An engine that runs while the context is open, in this event loop.

    Args:
        folder: of the model whose tokenizer says which tokens are words. Its weights are not needed.
        board: of leases; this process owns it.

    Raises:
        StartupError: no such profile, no words, or a taken port.
    """
    engine = SimulatedEngine(
        settings, profile_of(settings.worker), words=printable_tokens(folder), served_name=served_name, board=board
    )
    engine.vocabulary = vocabulary_size(folder)
    async with engine.serving():
        yield engine


class SimulatedEngine:
    """See `running`, which makes it."""

    device = "simulated"

    def __init__(
        self, settings: Settings, profile: Profile, *, words: Sequence[int], served_name: str, board: Board
    ) -> None:
        transfer = settings.transfer
        self.profile = profile
        self.vocabulary = 1 << 32
        self._seed = settings.simulated.seed
        self._words = words
        self._served_name = served_name
        self._board = board
        self._clock = Clock(settings.simulated.speed)
        self._scheduler = Scheduler(profile, record_cache=False)
        self._door = Door(
            Identity(),
            Peers(),
            silence_s=transfer.silence_s,
            refused=lambda why: board.add(REFUSED[why]),
        )
        self._sending = SendingSide(
            profile,
            self._clock,
            self._door,
            epoch=board.epoch,
            host=transfer.host or settings.worker.host,
            port=transfer.port,
            parked_s=transfer.lease_s,
            taken=lambda outgoing: self._held.taken(outgoing),
        )
        self._receiving = ReceivingSide(self._door, dial_s=transfer.timeout_s)
        self._held = HeldPrompts(board, self._sending, self._free)
        self._streams: dict[str, Stream] = {}
        self._work = asyncio.Event()
        self._cache_news = asyncio.Event()
        self._cache_events = settings.worker.cache_events
        self._tells_cache = False
        self._alive = False
        self._requests_total = 0
        self._tokens_total = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run while the context is open."""
        async with AsyncExitStack() as owned:
            await self._sending.open()
            owned.push_async_callback(self._sending.close)
            owned.push_async_callback(self._receiving.close)
            await owned.enter_async_context(background(self._held.watch(), name="simulated-leases"))
            self._alive = True
            await owned.enter_async_context(background(self._run(), name="simulated-engine"))
            self._publish()
            try:
                yield
            finally:
                self.shutdown()

    # -- requests -----------------------------------------------------------------------------------------

    async def prefill(
        self,
        request_id: str,
        token_ids: Sequence[int],
        lease: tuple[int, int],
        *,
        permit: Permit,
        source: Handoff | None,
        cached_only: bool,
        cache_salt: str = "",
    ) -> PromptComputed:
        """See `Engine.prefill`."""
        stream = self._stream(request_id, token_ids, 0, cached_only=cached_only, cache_salt=cache_salt)
        tokens = len(stream.prompt) - 1 if cached_only else len(stream.prompt)
        async with self._queued(stream, source, _SOURCE_PATIENCE_S):
            outgoing = Outgoing(permit, tokens, digest_tokens(stream.prompt[:tokens]))
            prompt = self._held.add(request_id, lease, outgoing)
            try:
                await stream.computed.wait()
                self._raise_if_failed(stream)
            except BaseException:
                self._held.end(prompt, Outcome.ABORTED)
                raise
            self._requests_total += 1
            self._tokens_total += stream.request.computed_tokens
            request = stream.request
            return PromptComputed(
                request.computed_tokens, request.cached_tokens, request.received_tokens, stream.times()
            )

    async def decode(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        handoff: Handoff | None,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokensGenerated, None]:
        """See `Engine.decode`."""
        _check_sampling(sampling)
        most = sampling.max_tokens if sampling.HasField("max_tokens") else self.profile.max_model_len
        stream = self._stream(request_id, token_ids, most, answers=True, cache_salt=cache_salt)
        stream.stop_ids, stream.min_tokens = frozenset(sampling.stop_token_ids), sampling.min_tokens
        self._requests_total += 1
        try:
            async with self._queued(stream, handoff, 0.0):
                while True:
                    await stream.news.wait()
                    self._raise_if_failed(stream)
                    tokens = stream.fetch()
                    self._tokens_total += len(tokens)
                    if stream.finish_reason:
                        break
                    yield TokensGenerated(tokens)
                yield TokensGenerated(
                    tokens,
                    finish_reason=stream.finish_reason,
                    stop_reason=stream.stop_reason,
                    account=stream.account(TRANSPORT),
                    times=stream.times(),
                )
        finally:
            self._free(request_id)

    @asynccontextmanager
    async def _queued(self, stream: Stream, handoff: Handoff | None, patience_s: float) -> AsyncIterator[None]:
        """The request is in the engine, and received for, while the context is open."""
        request = stream.request
        self._streams[request.request_id] = stream
        try:
            await asyncio.sleep(self._clock.real_s(self.profile.overhead_s))
            stream.queued_s = time.monotonic()
            expected = handoff is not None and not self._has(request)
            request.receives = expected
            self._scheduler.add(request, self._clock.now_s(), expected=expected)
            self._work.set()
            if not expected:
                yield
                return
            assert handoff is not None
            async with background(self._receive(stream, handoff, patience_s), name="simulated-receive"):
                yield
        finally:
            if stream.request.stage is not Stage.HELD:
                self._free(request.request_id)
            self._streams.pop(request.request_id, None)

    async def _receive(self, stream: Stream, handoff: Handoff, patience_s: float) -> None:
        """Have a request's blocks sent here; whatever fails, the request goes on and computes them."""
        request = stream.request
        sender = handoff.sender
        place = Place(handoff.id, sender.address, sender.epoch, sender.public_key, handoff.token)
        try:
            check(place)
            async with self._receiving.receiving(place) as incoming:
                async with asyncio.timeout(patience_s or None):
                    tokens, digest = await asyncio.shield(incoming.started)
                if digest_tokens(stream.prompt[:tokens]) != digest:
                    raise TransferError("the handoff is another prompt's", code="bad_handoff")
                self._scheduler.started(request.request_id)
                self._work.set()
                await stream.admitted.wait()
                if request.stage is not Stage.RECEIVING:
                    return  # all of it is cached by now
                last = min(tokens, request.prompt_tokens - 1)
                first, end = request.done // self.profile.block_tokens, -(-last // self.profile.block_tokens)
                incoming.ask(first, end - first)
                await asyncio.shield(incoming.arrived)
                stream.moved = Moved(end - first, incoming.bytes_moved, incoming.transfer_s, incoming.exposed_s)
                self._scheduler.received(request.request_id, last - request.done)
        except TransferError as error:
            self._failed(stream, error.code)
        except TimeoutError:
            self._failed(stream, "timeout")
        except Exception:  # a request must not wait for ever, whatever is wrong
            log.exception("transfer_broke", request_id=request.request_id)
            self._failed(stream, "internal_error")
        else:
            self._count_received(stream)
        self._work.set()

    def _failed(self, stream: Stream, code: str) -> None:
        stream.moved = Moved(failure=code)
        self._board.add(FAILURES.get(code, Counter.FAILED_OTHER))
        log.warning("transfer_failed", request_id=stream.request.request_id, code=code)
        self._scheduler.failed(stream.request.request_id)

    def _count_received(self, stream: Stream) -> None:
        board, moved = self._board, stream.moved
        board.add(Counter.TRANSFERS_DONE)
        board.add(Counter.BLOCKS_RECEIVED, moved.blocks)
        board.add(Counter.BYTES_RECEIVED, moved.bytes_moved)
        board.add(Counter.WIRE_BYTES, moved.bytes_moved)
        board.add(Counter.TRANSFER_NS, int(moved.transfer_s * 1e9))
        board.add(Counter.EXPOSED_NS, int(moved.exposed_s * 1e9))
        board.add(Counter.HIDDEN_NS, int(max(0.0, moved.transfer_s - moved.exposed_s) * 1e9))
        board.add(Counter.PROMPT_TOKENS_RECEIVED, stream.request.received_tokens)

    def _free(self, request_id: str) -> None:
        """Nobody wants this request any more; unknown ids are fine."""
        self._scheduler.abort(request_id)
        self._work.set()

    def _stream(
        self,
        request_id: str,
        token_ids: Sequence[int],
        max_tokens: int,
        *,
        answers: bool = False,
        cached_only: bool = False,
        cache_salt: str = "",
    ) -> Stream:
        if not self._alive:
            raise EngineDeadError("the worker's engine is not running")
        if request_id in self._streams:
            raise InvalidRequestError(f"request_id: {request_id} is in the engine already", param="request_id")
        prompt = array("I", token_ids)
        if max(prompt, default=0) >= self.vocabulary:
            message = f"token_ids: {max(prompt)} is not below the vocabulary's {self.vocabulary}"
            raise InvalidRequestError(message, param="token_ids")
        root = root_key(self._served_name, self.profile.block_tokens, cache_salt)
        keys = extend(root, prompt, self.profile.block_tokens)
        request = Request(request_id, len(prompt), max_tokens, keys, cached_only=cached_only)
        self._scheduler.check(request)
        answer = Answer(prompt, self._seed, self._words) if answers else None
        return Stream(request, prompt, self.profile.block_tokens, root, answer)

    def _has(self, request: Request) -> bool:
        """Whether all that could be received is cached here."""
        most = (request.prompt_tokens - 1) // self.profile.block_tokens
        return (
            len(self._scheduler.pool.match(request.keys, most)) * self.profile.block_tokens >= request.prompt_tokens - 1
        )

    def _raise_if_failed(self, stream: Stream) -> None:
        if stream.failure is not None:
            raise stream.failure

    # -- the cycle ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._steps()
        except Exception:
            log.exception("simulated_engine_died")
            self.shutdown()  # whoever looks sees that it is not alive

    async def _steps(self) -> None:
        """Step after step. A step begins where the last one ended, so that late timers do not add up."""
        scheduler, clock = self._scheduler, self._clock
        free_s, late_s = 0.0, _CATCH_UP_S * max(1.0, clock.speed)
        while self._alive:
            self._work.clear()
            began_s = max(free_s, clock.now_s() - late_s)
            step = scheduler.plan(began_s)
            self._note(scheduler.take_events())
            if step is None:
                self._publish()
                await self._work.wait()
                free_s = clock.now_s()
                continue
            self._begin(step)
            free_s = began_s + step.seconds
            await clock.until(free_s)
            self._end(step, scheduler.finish(step, free_s))
            self._publish()

    def _begin(self, step: Step) -> None:
        for chunk in step.chunks:
            request = chunk.request
            stream = self._streams.get(request.request_id)
            if stream is None:
                continue
            stream.admitted.set()
            if not stream.scheduled_s:
                stream.scheduled_s = time.monotonic()
            held = self._held.get(request.request_id)
            if held is not None:
                self._held.progress(held, chunk.before // self.profile.block_tokens, computed=False)

    def _end(self, step: Step, events: list[Event]) -> None:
        now_s = time.monotonic()
        for chunk in step.chunks:
            held = self._held.get(chunk.request.request_id)
            if held is not None and chunk.request.stage is Stage.PREFILLING:
                self._held.progress(held, chunk.request.done // self.profile.block_tokens, computed=False)
        for _, request in events:
            self._say(request, request.generated, now_s)
        for request in tuple(self._scheduler.decoding()):
            self._say(request, self._scheduler.generated(request), now_s)
        self._note(events)

    def _say(self, request: Request, generated: int, now_s: float) -> None:
        stream = self._streams.get(request.request_id)
        if stream is None or stream.answer is None or generated <= stream.count:
            return
        if not stream.count:
            stream.first_token_s = now_s
        stream.last_token_s = now_s
        stream.generate(generated)
        if stream.finish_reason:
            self._scheduler.abort(request.request_id)

    def _note(self, events: list[Event]) -> None:
        board = self._board
        for kind, request in events:
            stream = self._streams.get(request.request_id)
            if stream is None:
                continue
            if kind is EventKind.RECEIVING:
                stream.admitted.set()
            elif kind is EventKind.PROMPT_COMPUTED:
                board.add(Counter.PROMPT_TOKENS_COMPUTED, request.computed_tokens)
                board.add(Counter.PROMPT_TOKENS_CACHED, request.cached_tokens)
                self._prompt_computed(stream)
            elif kind is EventKind.FINISHED:
                stream.finish_reason = stream.finish_reason or FinishReason.FINISH_REASON_LENGTH
                stream.news.set()
            elif kind is EventKind.PREEMPTED:
                board.add(Counter.PREEMPTIONS)
                if self._held.get(request.request_id) is not None:
                    board.add(Counter.HANDOFFS_RESET)
            elif (held := self._held.get(request.request_id)) is not None:
                self._held.end(held, Outcome.NOT_CACHED)

    def _prompt_computed(self, stream: Stream) -> None:
        stream.admitted.set()
        stream.first_token_s = stream.first_token_s or time.monotonic()
        held = self._held.get(stream.request.request_id)
        if held is not None:
            self._held.progress(held, -(-held.outgoing.tokens // self.profile.block_tokens), computed=True)
        stream.computed.set()

    def _publish(self) -> None:
        board, pool = self._board, self._scheduler.pool
        board.set_gauge(Counter.BLOCKS_TOTAL, pool.total)
        board.set_gauge(Counter.BLOCKS_FREE, pool.free)
        board.set_gauge(Counter.BLOCK_TOKENS, self.profile.block_tokens)
        board.set_gauge(Counter.BLOCK_BYTES, self.profile.block_bytes)
        if self._tells_cache:
            self._cache_news.set()

    # -- state --------------------------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        profile = self.profile
        return Capacity(
            max_model_len=profile.max_model_len,
            block_tokens=profile.block_tokens,
            blocks=profile.blocks,
            block_bytes=profile.block_bytes,
            max_running=profile.max_running,
        )

    def load(self) -> Load:
        """See `Engine.load`."""
        load, board = self._scheduler.load(), self._board
        return Load(
            running=load.running,
            waiting=load.waiting,
            blocks_used=load.blocks_used,
            requests_total=self._requests_total,
            tokens_total=self._tokens_total,
            handoffs_held=board.counter(Counter.HANDOFFS_HELD),
            fallbacks_total=sum(board.counter(word) for cause, word in FAILURES.items() if cause != "cancelled")
            + board.counter(Counter.FAILED_OTHER)
            + board.counter(Counter.HANDOFFS_EXPIRED),
            waiting_tokens=load.waiting_tokens,
            context_tokens=load.context_tokens,
        )

    def transfer(self) -> TransferEndpoint | None:
        """See `Engine.transfer`."""
        if not self._sending.address:
            return None
        return TransferEndpoint(
            address=self._sending.address,
            epoch=self._board.epoch,
            transports=[TRANSPORT],
            public_key=self._door.identity.public,
        )

    async def admit(self, keys: Collection[bytes]) -> None:
        """See `Engine.admit`."""
        self._door.peers.set(keys)

    async def probe_path(self, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
        """The profile's figures, once the peer has answered; see `Engine.probe_path`."""
        path = TransferPath(
            peer_worker_id=worker_id, peer_epoch=peer.epoch, transport=TRANSPORT, measured_unix_s=int(time.time())
        )
        try:
            if transport not in ("", TRANSPORT):
                raise TransferError(f"simulated workers know no way called {transport!r}", code="no_path")
            await self._receiving.reach(peer.address, peer.epoch, peer.public_key)
        except TransferError as error:
            path.error = error.message
            return path
        path.detail = self.profile.name
        path.bytes_per_s, path.latency_s = self.profile.transfer_bytes_per_s, self.profile.transfer_latency_s
        return path

    def cache_changes(self) -> AsyncIterator[CacheChange] | None:
        """See `Engine.cache_changes`."""
        return self._changes() if self._cache_events else None

    async def _changes(self) -> AsyncGenerator[CacheChange, None]:
        self._scheduler.record_cache_events()
        self._tells_cache = True
        self._cache_news.set()
        while self._alive:
            await self._cache_news.wait()
            self._cache_news.clear()
            stored, removed = self._scheduler.drain_cache_events()
            if stored or removed:
                yield CacheChange(stored, removed)

    @property
    def alive(self) -> bool:
        return self._alive

    def shutdown(self) -> None:
        """No more steps; who still waits for one is told."""
        self._alive = False
        for stream in self._streams.values():
            stream.failure = EngineDeadError("the worker's engine has ended")
            stream.news.set()
            stream.computed.set()
        self._cache_news.set()
        self._work.set()


# What a timer may be late without the engine's losing that time for good.
_CATCH_UP_S = 0.05


def _check_sampling(sampling: SamplingParams) -> None:
    if sampling.stop:
        raise InvalidRequestError("stop: workers match token ids only, send stop strings to a frontend", param="stop")
    if sampling.HasField("logprobs"):
        raise InvalidRequestError("logprobs: a simulated engine has none to tell; leave it out", param="logprobs")
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens: {sampling.max_tokens}, at least 1 is needed", param="max_tokens")
