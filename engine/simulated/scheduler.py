"""Continuous batching with chunked prefill and paged KV, as vLLM's scheduler does it, in simulated time.

After vllm/v1/core/sched/scheduler.py (0.32): a step has one budget of tokens; requests that run come first (one token
for each that generates, then what fits of prompts under way), then the queue by priority and arrival, while a prompt's
whole need of blocks is free. When a running one needs a block and none is free, the last admitted of the lowest
priority loses its blocks, goes back to the front of the queue and is computed again.

Pure: the caller passes the time, waits for `Step.seconds`, and tells what came from other workers. A step's cost here
does not grow with the batch: a decoding request is touched when it needs a block and when it ends, its tokens are
counted by the `tick` of the whole batch. So one core simulates millions of tokens a second.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from engine.simulated.blocks import BlockPool
from engine.simulated.request import Chunk, Event, EventKind, Request, SchedulerLoad, Stage, Step
from slipstream.errors import ContextLengthError, InvalidRequestError
from slipstream.performance import Predictor, Profile


class Scheduler:
    """One engine's queue, batch and blocks.

    The cycle: `add` whenever requests come; `plan` when no step runs; after `Step.seconds`, `finish`.
    `take_events` after either, and after `abort` or `failed`, tells what happened.

    Args:
        predictor: made once for a profile; many schedulers may share it.
        record_cache: keep changes of the prefix cache for `drain_cache_events`.
    """

    def __init__(self, profile: Profile, predictor: Predictor | None = None, *, record_cache: bool = True) -> None:
        self.profile = profile
        self.predictor = predictor or Predictor(profile)
        self.pool = BlockPool(profile.blocks, record=record_cache)
        self._block_tokens = profile.block_tokens
        self._max_running = min(profile.max_running, profile.step_tokens)
        self._requests: dict[str, Request] = {}
        self._queue: list[tuple[int, int, int, int, Request]] = []  # priority, not preempted, arrival, turn
        self._arrived: list[tuple[int, int, int, Request]] = []  # received ones: priority, arrival, turn
        self._prefilling: list[Request] = []  # in order of admission
        self._decoding: dict[str, Request] = {}
        self._waiting = 0
        self._receiving = 0
        self._held = 0
        self._tick = 0
        self._ends: list[int] = []  # a heap of the ticks in `_end_at`
        self._grow_at: dict[int, list[tuple[Request, int]]] = {}
        self._end_at: dict[int, list[tuple[Request, int]]] = {}
        self._context_tokens = 0
        self._waiting_tokens = 0
        self._orders = 0
        self._preemptions = 0
        self._freed = 0
        self._refused: tuple[Request, int] | None = None
        self._events: list[Event] = []
        self._step: Step | None = None

    # -- from outside -------------------------------------------------------------------------------------

    def add(self, request: Request, now_s: float = 0.0, *, expected: bool = False) -> None:
        """Queue a request.

        Args:
            expected: it `receives` from a worker that has not begun; it takes no blocks before `started`.

        Raises:
            InvalidRequestError: no prompt, or an id that is known.
            ContextLengthError: it can never fit.
        """
        self.check(request)
        request.max_tokens = min(request.max_tokens, self.profile.max_model_len - request.prompt_tokens)
        self._orders += 1
        request.order = request.arrival = self._orders
        self._requests[request.request_id] = request
        self._count_waiting_tokens(request, request.prompt_tokens)
        self._waiting += 1
        if expected:
            request.stage = Stage.EXPECTING
        else:
            self._enqueue(request)

    def started(self, request_id: str) -> None:
        """The sender of an expected request's prompt has begun to compute it."""
        request = self._requests.get(request_id)
        if request is not None and request.stage is Stage.EXPECTING:
            self._enqueue(request)

    def received(self, request_id: str, tokens: int, now_s: float = 0.0) -> None:
        """Blocks for that many prompt tokens behind the cached ones have come; the rest is computed here."""
        request = self._requests.get(request_id)
        if request is None or request.stage is not Stage.RECEIVING:
            return
        request.received_tokens = max(0, min(tokens, request.tokens - 1 - request.done))
        request.done += request.received_tokens
        self._store_full(request, request.done)
        self._count_waiting_tokens(request, request.tokens - request.done)
        self._receiving -= 1
        self._enter(request, Stage.WAITING)
        heapq.heappush(self._arrived, (request.priority, request.arrival, request.turn, request))

    def failed(self, request_id: str, now_s: float = 0.0) -> None:
        """Nothing will be received: all that is not cached is computed here."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.stage is Stage.RECEIVING:
            self.received(request_id, 0, now_s)
        elif request.receives and request.stage in (Stage.EXPECTING, Stage.WAITING):
            request.receives = False
            self._enqueue(request)

    def release(self, request_id: str) -> None:
        """Free the blocks of a prefill-only request; they stay cached. Unknown ids are fine."""
        request = self._requests.get(request_id)
        if request is not None and request.stage is Stage.HELD:
            self._held -= 1
            self._end(request)

    def abort(self, request_id: str) -> None:
        """End a request at once, wherever it is. Unknown ids are fine."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.stage is Stage.DECODING:
            self._leave_decoding(request)
        elif request.stage is Stage.PREFILLING:
            self._prefilling.remove(request)
        elif request.stage is Stage.HELD:
            self._held -= 1
        else:
            self._waiting -= 1
            self._receiving -= request.stage is Stage.RECEIVING
        self._end(request)

    # -- the cycle ----------------------------------------------------------------------------------------

    def plan(self, now_s: float, most_ticks: int = 1) -> Step | None:
        """What to compute next; None when nothing can be. The caller calls `finish` once its seconds are over.

        Args:
            most_ticks: with more than one, ticks that only generate, and between which no request ends, are one step:
                a simulation has fewer events, and the same times. While such a step runs, call `catch_up` before
                anything else is asked or told, and `shorten` when the next plan would be another one.
        """
        if self._step is not None:
            raise RuntimeError("a step runs: finish it before the next one is planned")
        before = self._preemptions
        self._grow_decoding()
        chunks = self._continue_prompts()
        settled = self._preemptions == before
        if settled:
            self._admit(chunks)
        batch = len(self._decoding)
        if not batch and not chunks:
            return None
        seconds = self.predictor.step_s(
            [(chunk.new_tokens, chunk.before) for chunk in chunks],
            batch,
            self._context_tokens / batch if batch else 0.0,
        )
        self._step = Step(seconds, chunks, batch, self._context_tokens, now_s)
        if most_ticks > 1 and settled and not chunks:
            self._merge(self._step, most_ticks)
        return self._step

    def catch_up(self, now_s: float) -> int:
        """Whatever has happened by now within a step of several ticks has happened: it begins with the tick that runs.

        Returns:
            Ticks that are over, which the step has no more.
        """
        step = self._step
        ticks = step.ticks_by(now_s) if step is not None else 0
        if step is None or not ticks:
            return 0
        self._pass(ticks)
        spent_s = step.span_s(ticks)
        step.started_s += spent_s
        step.seconds -= spent_s
        step.first_s += step.growth_s * ticks
        step.context_tokens += step.batch * ticks
        step.ticks -= ticks
        return ticks

    def shorten(self, step: Step, now_s: float) -> float:
        """Something has come that the next step should know: the step ends with the tick that runs now.

        Returns:
            When that is.
        """
        self.catch_up(now_s)
        step.ticks, step.seconds = 1, step.first_s if step.ticks > 1 else step.seconds
        return step.started_s + step.seconds

    def finish(self, step: Step, now_s: float) -> list[Event]:
        """The step's time is over: every request of `decoding` has one more token. Returns `take_events`."""
        if step is not self._step:
            raise RuntimeError("another step runs than the one that is to be finished")
        if step.ticks > 1:
            self._pass(step.ticks - 1)
        self._step = None
        self._context_tokens += len(self._decoding)
        for request, turn in self._end_at.pop(self._tick, ()):
            if request.turn == turn:
                self._tick += 1
                self._leave_decoding(request)
                self._tick -= 1
                self._finished(request)
        self._tick += 1
        for request, turn, new_tokens, before in step.chunks:
            if request.turn == turn:
                request.done = before + new_tokens
                self._count_waiting_tokens(request, request.tokens - request.done)
                if request.done == request.tokens:
                    self._prompt_computed(request)
        return self.take_events()

    def take_events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # -- views --------------------------------------------------------------------------------------------

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    @property
    def open_requests(self) -> int:
        """All that are here, in whatever stage."""
        return len(self._requests)

    def decoding(self) -> Iterable[Request]:
        """Those that get a token with each step, in order of admission."""
        return self._decoding.values()

    def generated(self, request: Request) -> int:
        """Tokens of its answer so far."""
        if request.stage is Stage.DECODING:
            return request.generated + self._tick - request.since_tick
        return request.generated

    def load(self) -> SchedulerLoad:
        return SchedulerLoad(
            running=len(self._decoding) + len(self._prefilling),
            waiting=self._waiting,
            blocks_used=self.pool.used,
            waiting_tokens=self._waiting_tokens,
            context_tokens=self._context_tokens,
            held=self._held,
            preemptions=self._preemptions,
        )

    def record_cache_events(self) -> None:
        """Begin to keep them; the first ones tell all that is cached."""
        self.pool.begin_recording()

    def drain_cache_events(self) -> tuple[list[int], list[int]]:
        """Keys stored and keys removed since the last call; none is in both."""
        return self.pool.drain()

    # -- planning -----------------------------------------------------------------------------------------

    def _pass(self, ticks: int) -> None:
        """Ticks in which all that changes are sequences that grow, into blocks that are known to be free."""
        grow_at, first = self._grow_at, self._tick + 1
        for tick in range(first, first + ticks):
            self._tick = tick
            if tick in grow_at:
                self._grow_decoding()
        self._context_tokens += len(self._decoding) * ticks

    def _grow_decoding(self) -> None:
        """Give a block to each decoding request whose next token begins one."""
        due = self._grow_at.pop(self._tick, None)
        if due is None:
            return
        pool, again = self.pool, []
        for one in due:
            request = one[0]
            if request.turn != one[1]:
                continue
            if request.keys:
                self._store_full(request, len(request.blocks) * self._block_tokens)
            if pool.free or self._make_room(1, request, []):
                request.blocks.append(pool.take_one())
                again.append(one)
        if again:
            self._grow_at.setdefault(self._tick + self._block_tokens, []).extend(again)

    def _merge(self, step: Step, most_ticks: int) -> None:
        ends = self._ends
        while ends and ends[0] < self._tick:
            heapq.heappop(ends)
        if ends:
            most_ticks = min(most_ticks, ends[0] - self._tick + 1)
        if most_ticks > 1:
            most_ticks = self._ticks_with_room(most_ticks, step.batch)
        if most_ticks > 1:
            mean_context = self._context_tokens / step.batch
            step.ticks, step.first_s, step.growth_s = self.predictor.decode_run(step.batch, mean_context, most_ticks)
            step.seconds = step.span_s(step.ticks)

    def _ticks_with_room(self, ticks: int, batch: int) -> int:
        """Ticks for whose growth enough blocks are free."""
        free = self.pool.free
        if free >= batch * (1 + (ticks - 1) // self._block_tokens):
            return ticks
        ticks = min(ticks, self._block_tokens)  # within which none grows twice
        for ahead in range(1, ticks):
            free -= len(self._grow_at.get(self._tick + ahead, ()))
            if free < 0:
                return ahead
        return ticks

    def _continue_prompts(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in tuple(self._prefilling):
            budget = self._budget(chunks)
            if budget <= 0:
                break
            if request.stage is Stage.PREFILLING:
                new_tokens = min(request.tokens - request.done, budget)
                need = self._blocks_of(request.done + new_tokens) - len(request.blocks)
                if need <= 0 or self._make_room(need, request, chunks):
                    self._compute(request, new_tokens, need, chunks)
        return chunks

    def _admit(self, chunks: list[Chunk]) -> None:
        """From the queue into the batch, received ones first: they hold blocks already."""
        budget = self._budget(chunks)
        while budget > 0 and len(self._prefilling) + len(self._decoding) < self._max_running:
            request = self._pop_arrived() or self._first()
            if request is None:
                return
            if not request.blocks and not self._take_cached(request):
                return
            if request.stage is Stage.WAITING:
                new_tokens = min(request.tokens - request.done, budget)
                self._waiting -= 1
                self._orders += 1
                request.order = self._orders
                self._enter(request, Stage.PREFILLING)
                self._prefilling.append(request)
                self._compute(
                    request, new_tokens, self._blocks_of(request.done + new_tokens) - len(request.blocks), chunks
                )
                budget -= new_tokens

    def _take_cached(self, request: Request) -> bool:
        """Hold what is cached of the queue's first prompt, if all of it has room; False: it has to wait.

        It may have left the queue for another stage: `RECEIVING`, or `OVER`.
        """
        if self._refused == (request, self._freed):
            return False
        hits = self.pool.match(request.keys, (request.tokens - 1) // self._block_tokens)
        cached = len(hits) * self._block_tokens
        if request.cached_only and cached < request.tokens - 1:
            heapq.heappop(self._queue)
            self._waiting -= 1
            self._end(request)
            self._events.append(Event(EventKind.NOT_CACHED, request))
            return True
        receives = request.receives and cached < request.tokens - 1
        missing = self._blocks_of(request.tokens) - len(hits)
        promised = sum(self._blocks_of(one.tokens) - len(one.blocks) for one in self._prefilling) if receives else 0
        if missing + self.pool.idle(hits) + promised > self.pool.free:
            self._refused = (request, self._freed)
            return False
        heapq.heappop(self._queue)
        self.pool.hold(hits)
        request.blocks = hits
        request.stored = len(hits)
        request.done = cached
        if not request.prompt_done:
            request.cached_tokens = min(cached, request.prompt_tokens)
        self._count_waiting_tokens(request, request.tokens - cached)
        if receives:
            request.blocks += self.pool.take(missing)
            self._receiving += 1
            self._enter(request, Stage.RECEIVING)
            self._events.append(Event(EventKind.RECEIVING, request))
        return True

    def _compute(self, request: Request, new_tokens: int, need: int, chunks: list[Chunk]) -> None:
        if need > 0:
            request.blocks += self.pool.take(need)
        # As in vLLM, before it is computed: whoever is planned after this step, or within, finds it there.
        self._store_full(request, request.done + new_tokens)
        chunks.append(Chunk(request, request.turn, new_tokens, request.done))

    def _make_room(self, need: int, request: Request, chunks: list[Chunk]) -> bool:
        """Free blocks for a running request; False when it had to give up its own."""
        while self.pool.free < need:
            victim = max((*self._prefilling, *self._decoding.values()), key=lambda one: (one.priority, one.order))
            self._preempt(victim)
            chunks[:] = [chunk for chunk in chunks if chunk.request is not victim]
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        if request.stage is Stage.DECODING:
            self._leave_decoding(request)
        else:
            self._prefilling.remove(request)
        self._preemptions += 1
        request.preemptions += 1
        request.recomputed_tokens += max(0, request.done - request.cached_tokens - request.received_tokens)
        if not request.prompt_done:
            request.cached_tokens = request.received_tokens = 0
        request.receives = False
        self._give_back(request)
        self._count_waiting_tokens(request, request.tokens)
        self._waiting += 1
        self._enqueue(request)
        self._events.append(Event(EventKind.PREEMPTED, request))

    # -- a request's way ----------------------------------------------------------------------------------

    def _prompt_computed(self, request: Request) -> None:
        self._prefilling.remove(request)
        if not request.prompt_done:
            request.prompt_done = True
            request.computed_tokens = request.prompt_tokens - request.cached_tokens - request.received_tokens
            self._events.append(Event(EventKind.PROMPT_COMPUTED, request))
        if request.max_tokens == 0:
            self._held += 1
            self._enter(request, Stage.HELD)
            return
        request.generated += 1
        if request.generated >= request.max_tokens:
            self._finished(request)
            return
        self._enter(request, Stage.DECODING)
        self._decoding[request.request_id] = request
        self._context_tokens += request.tokens
        request.since_tick = self._tick
        last = self._tick + request.max_tokens - request.generated - 1
        self._end_at.setdefault(last, []).append((request, request.turn))
        heapq.heappush(self._ends, last)
        # The token at position p is computed, and needs its block, p - done ticks from now.
        self._grow_later(request, self._tick + len(request.blocks) * self._block_tokens - request.done)

    def _grow_later(self, request: Request, tick: int) -> None:
        self._grow_at.setdefault(tick, []).append((request, request.turn))

    def _leave_decoding(self, request: Request) -> None:
        request.generated = self.generated(request)
        request.done = request.tokens - 1
        del self._decoding[request.request_id]
        self._context_tokens -= request.tokens
        self._store_full(request, request.done)

    def _finished(self, request: Request) -> None:
        self._end(request)
        self._events.append(Event(EventKind.FINISHED, request))

    def _end(self, request: Request) -> None:
        self._give_back(request)
        self._count_waiting_tokens(request, 0)
        self._enter(request, Stage.OVER)
        del self._requests[request.request_id]

    def _enter(self, request: Request, stage: Stage) -> None:
        request.stage = stage
        request.turn += 1

    def _enqueue(self, request: Request) -> None:
        self._enter(request, Stage.WAITING)
        self._refused = None
        heapq.heappush(self._queue, (request.priority, not request.preemptions, request.arrival, request.turn, request))

    def _first(self) -> Request | None:
        """The queue's first; entries whose request has gone elsewhere are dropped."""
        while self._queue:
            request, turn = self._queue[0][4], self._queue[0][3]
            if request.turn == turn:
                return request
            heapq.heappop(self._queue)
        return None

    def _pop_arrived(self) -> Request | None:
        while self._arrived:
            _, _, turn, request = heapq.heappop(self._arrived)
            if request.turn == turn:
                return request
        return None

    # -- counts -------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request_id: {request.request_id} is in the engine already", param="request_id")
        if request.prompt_tokens < 1:
            raise InvalidRequestError("token_ids: at least one token is needed", param="token_ids")
        profile = self.profile
        if request.prompt_tokens >= profile.max_model_len:
            raise ContextLengthError(
                f"the prompt has {request.prompt_tokens} tokens; with one token of answer at most "
                f"{profile.max_model_len} fit (worker.max_model_len)",
                param="token_ids",
            )
        longest = min(request.prompt_tokens + request.max_tokens, profile.max_model_len)
        if self._blocks_of(longest) > profile.blocks:
            raise ContextLengthError(
                f"prompt and answer may have {longest} tokens; the KV cache has room for "
                f"{profile.blocks * self._block_tokens} (the profile's blocks)",
                param="token_ids",
            )

    def _budget(self, chunks: list[Chunk]) -> int:
        return self.profile.step_tokens - len(self._decoding) - sum(chunk.new_tokens for chunk in chunks)

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _store_full(self, request: Request, tokens: int) -> None:
        """Enter the keys of the blocks that these first tokens fill."""
        full = min(tokens // self._block_tokens, len(request.keys), len(request.blocks))
        for index in range(request.stored, full):
            self.pool.store(request.blocks[index], request.keys[index])
        if full > request.stored:
            request.stored = full

    def _give_back(self, request: Request) -> None:
        if request.blocks:
            if request.stored:
                self.pool.give_back(request.blocks)
            else:
                self.pool.give_back_plain(request.blocks)
            self._freed += 1
        request.blocks = []
        request.stored = request.done = 0

    def _count_waiting_tokens(self, request: Request, tokens: int) -> None:
        self._waiting_tokens += tokens - request.uncounted
        request.uncounted = tokens
