"""One dispatch of one request: its calls to a prefill worker and a decode worker, made at once, and their end.

The two workers find each other by the handoff id that both calls carry, and the blocks travel between them. Here
both calls are only watched: what prefill does matters until decode's first tokens have come.

An attempt owns its calls, and has no task of its own. `close` ends the calls at once, from any state and without
waiting; it is what makes cancellation reach the workers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from frontend.attempt_trace import AttemptTrace
from frontend.deadlines import NEVER_S
from frontend.router import Fleet, Route
from frontend.router.candidate import Share
from frontend.signs_of_life import SignsOfLife
from frontend.worker_call import DecodeCall, PrefillCall
from frontend.worker_failure import FailureKind, WorkerFailure
from frontend.worker_stream import WorkerStreams
from frontend.write_back import WriteBack
from slipstream.errors import DeadlineError, WorkerLostError
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

HANDOFF_ID_BYTES, HANDOFF_TOKEN_BYTES = 16, 32
_PATIENCE = 3.0
"""Times the predicted time of a prompt that a worker may be silent: predictions are wrong, and first ones most."""
COMPUTED_GRACE_S = 0.2
"""How long prefill's word may come after decode's first tokens: it was sent before them, on another connection."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every attempt of a dispatcher shares.

    Attributes:
        frontend_id: by which workers tell this frontend's requests from others'.
        signs: of prefill workers that compute.
    """

    settings: FrontendSettings
    streams: WorkerStreams
    fleet: Fleet
    clock: Callable[[], float]
    frontend_id: str = ""
    signs: SignsOfLife = field(default_factory=SignsOfLife)


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent: the prompt with whatever was already generated, and how to go on from there.

    Attributes:
        name: what the workers call it: none may know it, and one may not have let go of an earlier attempt yet.
        deadline_s: the clock's time at which the whole request must have ended.
    """

    request_id: str
    name: str
    model: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    deadline_s: float
    cache_salt: str = ""


@dataclass(slots=True)
class Attempt:
    """Use: `start`, `next_tokens` until it is finished, and `close` in every case.

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
    _source: PrefillCall | None = None
    _prefill: PrefillCall | None = None
    _decode: DecodeCall | None = None
    _prefill_failure: Exception | None = None
    _prefill_settled: asyncio.Event | None = None
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
            request_id=job.name, model=job.model, token_ids=job.token_ids, sampling=job.sampling, handoff=handoff
        )
        request.frontend_id, request.cache_salt = self.around.frontend_id, job.cache_salt
        trace = self.trace.decode(self.route.decode)
        self._decode = self.around.streams.decode(self.route.decode, request, trace)

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
            self._expect(self._decode, self.around.settings.token_timeout_s)
            event = await self._read_tokens("token", self.around.settings.token_timeout_s)
        if event.finish_reason:
            await self._finished(event)
        self.last_s = self.around.clock() - self.began_s
        self.tokens += len(event.token_ids)
        return event

    async def _finished(self, event: DecodeEvent) -> None:
        account = event.account
        if account.kv_blocks_moved and self._prefill_is_open:
            # Blocks came, so the prompt was computed: the account shall have the figures.
            self._prefill_settled = asyncio.Event()
            try:
                async with asyncio.timeout(COMPUTED_GRACE_S):
                    await self._prefill_settled.wait()
            except TimeoutError:
                pass
        self.decode_computed_tokens = account.decode_computed_tokens
        self.recomputed = bool(account.fallback)
        self.trace.finished(event)

    @property
    def ignored_failure(self) -> WorkerFailure | None:
        """What went wrong on the prefill worker when decode had answered already."""
        error = self._prefill_failure
        return error if self.tokens_came and isinstance(error, WorkerFailure) else None

    def close(self) -> None:
        """End the calls now: what they had not finished is aborted on the workers. Never blocks, never fails."""
        self._end_prefill()
        if self._decode is not None:
            self._decode.end()
        for share in (self._prefill_share, self._decode_share):
            if share is not None:
                share.end(self.around.clock())
        self.trace.close()
        # Who wants to know keeps this attempt: together they would wait for the collector of cycles, prompt and all. So
        # would an error that was raised, with the frames it came through.
        self.on_computed = _told_nobody
        if self.ignored_failure is None:
            self._prefill_failure = None

    def _start_source(self) -> Handoff:
        """Have a decode worker hand over the beginning of the prompt. Its call is not read: the prefill worker
        sees for itself what comes, and computes the rest."""
        assert self.write_back is not None
        job, worker = self.job, self.write_back.source
        handoff = _handoff_from(worker)
        request = PrefillRequest(
            request_id=f"{job.name}-write-back",
            model=job.model,
            # One more than is handed over: the last token of a prompt is never taken from a cache.
            token_ids=job.token_ids[: self.write_back.tokens + 1],
            handoff_id=handoff.id,
            handoff_token=handoff.token,
            receiver_key=_key_of(self.route.prefill),
            cached_only=True,
            frontend_id=self.around.frontend_id,
            cache_salt=job.cache_salt,
        )
        self._source = self.around.streams.prefill(worker, request, {})
        return handoff

    def _start_prefill(self, worker: WorkerRecord, source: Handoff | None) -> Handoff:
        job, handoff = self.job, _handoff_from(worker)
        request = PrefillRequest(
            request_id=job.name,
            model=job.model,
            token_ids=job.token_ids,
            handoff_id=handoff.id,
            handoff_token=handoff.token,
            receiver_key=_key_of(self.route.decode),
            source=source,
        )
        request.frontend_id, request.cache_salt = self.around.frontend_id, job.cache_salt
        self._prefill = call = self.around.streams.prefill(worker, request, self.trace.prefill(worker))
        call.on_event, call.on_failure = self._prefill_said, self._prefill_failed
        self._expect(call, self._silence_left_s(worker) or 0.0)
        return handoff

    def _silence_left_s(self, worker: WorkerRecord) -> float | None:
        """How long the prefill worker may go on as it does: to its limit if it is seen to compute, else less.

        None: it is over."""
        around, now_s = self.around, self.around.clock()
        end_s = self.began_s + around.settings.prefill_timeout_s
        seen_s = around.signs.last_s(worker.worker_id)
        if seen_s is not None:
            predicted = self.route.predicted
            expected_s = predicted.queue_s + predicted.prefill_s if predicted is not None else 0.0
            patience_s = max(around.settings.prefill_silence_s, _PATIENCE * expected_s)
            end_s = min(end_s, max(seen_s, self.began_s) + patience_s)
        return end_s - now_s if end_s > now_s else None

    @property
    def _prefill_is_open(self) -> bool:
        """Whether the prefill worker has yet to say that the prompt is computed."""
        return self._prefill is not None and self.computed is None and self._prefill_failure is None

    def _prefill_said(self, event: PrefillEvent | None) -> None:
        """The call stays open after it has computed, and the blocks held, until the first tokens."""
        if self.computed is not None or self._prefill is None:
            return
        worker = self._prefill.worker
        if event is None or not event.HasField("computed"):
            lost = WorkerLostError(f"prefill worker {worker.worker_id} ended the call without having computed")
            self._prefill_failed(WorkerFailure(worker, FailureKind.FAILED, lost))
            return
        self._prefill.expect_by(NEVER_S)
        self.around.signs.computed(worker.worker_id, self.around.clock())
        self.computed = event.computed
        self.trace.computed(event.computed)
        self.prefill_s = self.around.clock() - self.began_s
        self._end_prefill_share()
        self._end_source()
        self._settle_prefill()
        if self.tokens_came:
            self._end_prefill()
        else:
            self._expect(self._decode, self.around.settings.first_token_timeout_s)
        self.on_computed(self)

    def _prefill_failed(self, error: Exception) -> None:
        if not self._prefill_is_open or self._prefill is None:
            return  # a prompt that was computed is decode's business
        if isinstance(error, TimeoutError):
            worker = self._prefill.worker
            left_s = self._silence_left_s(worker)
            if left_s is not None and self.around.clock() < self.job.deadline_s:
                self._expect(self._prefill, left_s)
                return
            error = self._gave_no_prompt(worker)
        self._prefill_failure = error
        self._settle_prefill()
        if not self.tokens_came and self._decode is not None:
            self._decode.failed(error)

    def _gave_no_prompt(self, worker: WorkerRecord) -> Exception:
        limit_s = self.around.settings.prefill_timeout_s
        if self.around.clock() >= min(self.began_s + limit_s, self.job.deadline_s):
            return self._too_late(worker, "computed prompt", limit_s)
        lost = WorkerLostError("it has prompts to compute, and was not seen to compute any of them")
        return WorkerFailure(worker, FailureKind.SILENT, lost)

    def _settle_prefill(self) -> None:
        if self._prefill_settled is not None:
            self._prefill_settled.set()

    async def _first_tokens(self) -> DecodeEvent:
        limit_s = self.around.settings.first_token_timeout_s
        # While prefill computes, its own limit is the one that runs.
        self._expect(self._decode, NEVER_S if self._prefill_is_open else limit_s)
        event = await self._read_tokens("first token", limit_s)
        # From here on decode is on its own: what happens to a prompt that was computed is its worker's business.
        self.tokens_came = True
        self.first_s, self.first_tokens = self.around.clock() - self.began_s, len(event.token_ids)
        if self._decode_share is not None:
            self._decode_share.prompt_done(self.around.clock())
        # Decode has its own copy of the prompt's blocks now, or has computed them: nobody needs the others.
        if self._prefill_is_open:
            self._grace = asyncio.get_running_loop().call_later(COMPUTED_GRACE_S, self._end_prefill)
        else:
            self._end_prefill()
        return event

    async def _read_tokens(self, awaited: str, limit_s: float) -> DecodeEvent:
        """Decode's next event with tokens or a finish."""
        call = self._decode
        assert call is not None, "start comes first"
        try:
            event = await call.read()
        except TimeoutError as error:
            raise self._too_late(call.worker, awaited, limit_s) from error
        if event is None:
            lost = WorkerLostError(f"decode worker {call.worker.worker_id} closed the call before the answer's end")
            raise WorkerFailure(call.worker, FailureKind.FAILED, lost)
        return event

    def _end_prefill(self) -> None:
        self._settle_prefill()
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

    def _expect(self, call: DecodeCall | PrefillCall | None, limit_s: float) -> None:
        """The next event within the limit and the request's deadline."""
        if call is not None:
            call.expect_by(min(self.around.clock() + limit_s, self.job.deadline_s))

    def _too_late(self, worker: WorkerRecord, awaited: str, limit_s: float) -> Exception:
        if self.around.clock() >= self.job.deadline_s:
            limit_s = self.around.settings.request_timeout_s
            return DeadlineError(f"the request took longer than frontend.request_timeout_s = {limit_s:g} s")
        return WorkerFailure(worker, FailureKind.TIMEOUT, WorkerLostError(f"no {awaited} within {limit_s:g} s"))


def _told_nobody(_: Attempt) -> None:
    """Once an attempt is closed."""


def _handoff_from(worker: WorkerRecord) -> Handoff:
    return Handoff(
        id=secrets.token_bytes(HANDOFF_ID_BYTES),
        worker_id=worker.worker_id,
        sender=worker.transfer,
        token=secrets.token_bytes(HANDOFF_TOKEN_BYTES),
    )


def _key_of(receiver: WorkerRecord | None) -> bytes:
    return receiver.transfer.public_key if receiver is not None else b""
