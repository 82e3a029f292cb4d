"""One dispatch of one request: its calls to a prefill worker and a decode worker, made at once, and their end.

The two workers find each other by the handoff id that both calls carry, and the blocks travel between them. Here
both calls are only watched: what prefill does matters until decode's first tokens have come.

An attempt owns its calls and tasks. `close` ends the calls at once, from any state and without waiting; it is
what makes cancellation reach the workers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from frontend.attempt_trace import AttemptTrace
from frontend.router import Fleet, Route
from frontend.router.candidate import Share
from frontend.worker_call import WorkerCall
from frontend.worker_channels import WorkerChannels
from frontend.worker_failure import FailureKind, WorkerFailure
from frontend.write_back import WriteBack
from slipstream.errors import DeadlineError, SlipstreamError, WorkerLostError
from slipstream.settings import FrontendSettings
from slipstream.v1.registry_pb2 import WorkerRecord
from slipstream.v1.sampling_pb2 import SamplingParams
from slipstream.v1.worker_pb2 import (
    DecodeEvent,
    DecodeRequest,
    Handoff,
    PrefillEvent,
    PrefillRequest,
    PromptComputed,
)
from slipstream.v1.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub

T = TypeVar("T")

HANDOFF_ID_BYTES = 16
END_TIMEOUT_S = 1.0
COMPUTED_GRACE_S = 0.2
"""How long prefill's word may come after decode's first tokens: it was sent before them, on another connection."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every attempt of a dispatcher shares.

    Attributes:
        frontend_id: by which workers tell this frontend's requests from others'.
    """

    settings: FrontendSettings
    channels: WorkerChannels
    fleet: Fleet
    clock: Callable[[], float]
    frontend_id: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent: the prompt with whatever was already generated, and how to go on from there.

    Attributes:
        deadline_s: the clock's time at which the whole request must have ended.
    """

    request_id: str
    model: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    deadline_s: float


@dataclass(slots=True)
class Attempt:
    """Use: `start`, `next_tokens` until it is finished, and `aclose` in every case.

    The work is counted for both workers from the start: requests that arrive together must see each other.

    Attributes:
        on_computed: called once, when the prefill worker has computed the prompt.
        write_back: a decode worker that hands the beginning of the prompt over to the prefill worker.
        computed: what the prefill worker said when the prompt was computed, `prefill_s` seconds after the start.
        tokens_came: whether the decode worker has answered, `first_s` seconds after the start.
        last_s: the last ones, so many seconds after the start.
        tokens, first_tokens: that came in all, and with the first answer.
        decode_computed_tokens: of the prompt; None until the decode worker has told.
        recomputed: whether decode computed a prompt that was to be handed over.
        began_s: the clock's time of the start.
    """

    around: Surroundings
    job: Job
    route: Route
    on_computed: Callable[[Attempt], None]
    write_back: WriteBack | None = None
    prefill_s: float = 0.0
    computed: PromptComputed | None = None
    tokens_came: bool = False
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    first_tokens: int = 0
    decode_computed_tokens: int | None = None
    recomputed: bool = False
    began_s: float = 0.0
    trace: AttemptTrace = field(default_factory=AttemptTrace)
    _source: WorkerCall[PrefillEvent] | None = None
    _prefill: WorkerCall[PrefillEvent] | None = None
    _decode: WorkerCall[DecodeEvent] | None = None
    _watching: asyncio.Task[None] | None = None
    _reading: asyncio.Task[DecodeEvent] | None = None
    _grace: asyncio.TimerHandle | None = None
    _prefill_share: Share | None = None
    _decode_share: Share | None = None

    def __post_init__(self) -> None:
        route, fleet, tokens = self.route, self.around.fleet, len(self.job.token_ids)
        self.began_s = self.around.clock()
        new_tokens = tokens if route.new_tokens is None else route.new_tokens
        if route.prefill is not None:
            self._prefill_share = fleet.begin(route.prefill.worker_id, tokens, new_tokens, self.began_s)
            new_tokens = 0
        self._decode_share = fleet.begin(route.decode.worker_id, tokens, new_tokens, self.began_s)

    def start(self) -> None:
        """Send the request to all workers of the route."""
        source = self._start_source() if self.write_back is not None else None
        handoff = self._start_prefill(self.route.prefill, source) if self.route.prefill is not None else None
        job = self.job
        request = DecodeRequest(
            request_id=job.request_id, model=job.model, token_ids=job.token_ids, sampling=job.sampling, handoff=handoff
        )
        request.frontend_id = self.around.frontend_id
        metadata = self.trace.decode(self.route.decode)
        self._decode = WorkerCall(
            self.around.channels,
            self.route.decode,
            lambda channel: DecodeWorkerStub(channel).Decode(request, metadata=metadata),
        )

    async def next_tokens(self) -> DecodeEvent:
        """The next event that has tokens or finishes the answer.

        Raises:
            WorkerFailure: of the decode worker; before its first tokens also of the prefill worker, as long as
                that has not computed the prompt.
            InvalidRequestError, DeadlineError
        """
        if not self.tokens_came:
            event = await self._first_tokens()
        else:
            assert self._decode is not None, "start comes first"
            limit_s = self.around.settings.token_timeout_s
            event = await self._in_time(self._read_tokens(), limit_s, self._decode.worker, "token")
        if event.finish_reason and event.account.kv_blocks_moved and self._watching is not None:
            # Blocks came, so the prompt was computed: the account shall have the figures.
            await asyncio.wait({self._watching}, timeout=COMPUTED_GRACE_S)
        self.last_s = self.around.clock() - self.began_s
        self.tokens += len(event.token_ids)
        if event.finish_reason:
            self.decode_computed_tokens = event.account.decode_computed_tokens
            self.recomputed = bool(event.account.fallback)
            self.trace.finished(event)
        return event

    async def await_end(self) -> None:
        """After the last event: let the worker end the call itself, so that it sees an answer and no abort."""
        assert self._decode is not None, "start comes first"
        # The answer is complete: how the call ends does not matter.
        with suppress(WorkerFailure, SlipstreamError):
            await self._in_time(self._decode.read(), END_TIMEOUT_S, self._decode.worker, "end")

    @property
    def ignored_failure(self) -> WorkerFailure | None:
        """What went wrong on the prefill worker when decode had answered already."""
        watching = self._watching
        if not self.tokens_came or watching is None or not watching.done() or watching.cancelled():
            return None
        error = watching.exception()
        return error if isinstance(error, WorkerFailure) else None

    def close(self) -> None:
        """End the calls now: what they had not finished is aborted on the workers. Never blocks, never fails."""
        self._end_prefill()
        for task in (self._watching, self._reading):
            if task is not None:
                task.cancel()
        if self._decode is not None:
            self._decode.end()
        for share in (self._prefill_share, self._decode_share):
            if share is not None:
                share.end(self.around.clock())
        self.trace.close()

    async def aclose(self) -> None:
        """`close`, and see the attempt's tasks end, which they do at once."""
        self.close()
        tasks: list[asyncio.Task[None] | asyncio.Task[DecodeEvent]] = []
        tasks += [self._watching] if self._watching is not None else []
        tasks += [self._reading] if self._reading is not None else []
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start_source(self) -> Handoff:
        """Have a decode worker hand over the beginning of the prompt. Its call is not read: the prefill worker
        sees for itself what comes, and computes the rest."""
        assert self.write_back is not None
        job, worker = self.job, self.write_back.source
        handoff = _handoff_from(worker)
        request = PrefillRequest(
            request_id=f"{job.request_id}-write-back",
            model=job.model,
            # One more than is handed over: the last token of a prompt is never taken from a cache.
            token_ids=job.token_ids[: self.write_back.tokens + 1],
            handoff_id=handoff.id,
            cached_only=True,
            frontend_id=self.around.frontend_id,
        )
        self._source = WorkerCall(
            self.around.channels, worker, lambda channel: PrefillWorkerStub(channel).Prefill(request)
        )
        return handoff

    def _start_prefill(self, worker: WorkerRecord, source: Handoff | None) -> Handoff:
        job, handoff = self.job, _handoff_from(worker)
        request = PrefillRequest(
            request_id=job.request_id, model=job.model, token_ids=job.token_ids, handoff_id=handoff.id, source=source
        )
        request.frontend_id = self.around.frontend_id
        metadata = self.trace.prefill(worker)
        self._prefill = WorkerCall(
            self.around.channels, worker, lambda channel: PrefillWorkerStub(channel).Prefill(request, metadata=metadata)
        )
        self._watching = asyncio.create_task(self._watch_prefill(self._prefill), name="watch_prefill")
        return handoff

    async def _watch_prefill(self, call: WorkerCall[PrefillEvent]) -> None:
        """Until the prompt is computed; the call stays open, and the blocks held, until the first tokens."""
        worker = call.worker
        event = await self._in_time(call.read(), self.around.settings.prefill_timeout_s, worker, "computed prompt")
        if event is None or not event.HasField("computed"):
            lost = WorkerLostError(f"prefill worker {worker.worker_id} ended the call without having computed")
            raise WorkerFailure(worker, FailureKind.FAILED, lost)
        self.computed = event.computed
        self.trace.computed(event.computed)
        self.prefill_s = self.around.clock() - self.began_s
        self._end_prefill_share()
        self._end_source()
        if self.tokens_came:
            self._end_prefill()
        self.on_computed(self)

    async def _first_tokens(self) -> DecodeEvent:
        assert self._decode is not None, "start comes first"
        self._reading = reading = asyncio.create_task(self._read_tokens(), name="first_tokens")
        if self._watching is not None:
            await asyncio.wait({reading, self._watching}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                self._watching.result()
        # From here on decode is on its own: what happens to a prompt that was computed is its worker's business.
        event = await self._in_time(
            reading, self.around.settings.first_token_timeout_s, self._decode.worker, "first token"
        )
        self.tokens_came = True
        self.first_s, self.first_tokens = self.around.clock() - self.began_s, len(event.token_ids)
        if self._decode_share is not None:
            self._decode_share.prompt_done(self.around.clock())
        # Decode has its own copy of the prompt's blocks now, or has computed them: nobody needs the others.
        if self.computed is not None or self._watching is None or self._watching.done():
            self._end_prefill()
        else:
            self._grace = asyncio.get_running_loop().call_later(COMPUTED_GRACE_S, self._end_prefill)
        return event

    async def _read_tokens(self) -> DecodeEvent:
        """Decode's next event with tokens or a finish; no limit here."""
        assert self._decode is not None
        while True:
            event = await self._decode.read()
            if event is None:
                worker = self._decode.worker
                lost = WorkerLostError(f"decode worker {worker.worker_id} closed the call before the answer's end")
                raise WorkerFailure(worker, FailureKind.FAILED, lost)
            if event.token_ids or event.finish_reason:
                return event

    def _end_prefill(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        self._end_source()
        if self._prefill is not None:
            self._prefill.end()
            self._end_prefill_share()

    def _end_source(self) -> None:
        if self._source is not None:
            self._source.end()

    def _end_prefill_share(self) -> None:
        if self._prefill_share is not None:
            self._prefill_share.end(self.around.clock())

    async def _in_time(self, reading: Awaitable[T], limit_s: float, worker: WorkerRecord, awaited: str) -> T:
        """What is read, within the limit and the request's deadline."""
        left_s = min(limit_s, self.job.deadline_s - self.around.clock())
        try:
            async with asyncio.timeout(left_s):
                return await reading
        except TimeoutError as error:
            if self.around.clock() >= self.job.deadline_s:
                limit_s = self.around.settings.request_timeout_s
                raise DeadlineError(
                    f"the request took longer than frontend.request_timeout_s = {limit_s:g} s"
                ) from error
            silent = WorkerLostError(f"no {awaited} within {limit_s:g} s")
            raise WorkerFailure(worker, FailureKind.TIMEOUT, silent) from error


def _handoff_from(worker: WorkerRecord) -> Handoff:
    return Handoff(id=secrets.token_bytes(HANDOFF_ID_BYTES), worker_id=worker.worker_id, sender=worker.transfer)
