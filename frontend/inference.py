"""The way of one request, shared by both faces: validate, template, tokenize, measure, dispatch, detokenize.

    async with service.answer(request) as answer:
        async for delta in answer: ...

Leaving the block, by its end, an error or a cancellation, aborts on every worker whatever still runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from frontend import access_log
from frontend.admission.claim import DEFAULT_CLAIM, DEFAULT_TENANT, Claim
from frontend.admission.tenants import Tenants
from frontend.answer_text import AnswerPiece, AnswerText
from frontend.cache_salt import salt_of
from frontend.cold_start import ColdStarts
from frontend.face_metrics import TokenTimes, Where, series
from frontend.fan_in import merged
from frontend.generation import Dispatcher, ServedModel, TokenRequest
from frontend.keys.guard import NOT_ITS_FAULT, Caller
from frontend.keys.ledger import Spending
from frontend.prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt, context_length_error
from frontend.request_life import received, stage
from frontend.request_record import RequestRecord, current
from frontend.sampling_fields import INT64_MAX
from frontend.tokenizer import TextModel
from slipstream.errors import (
    DeadlineError,
    InvalidRequestError,
    ModelNotFoundError,
    NoWorkerError,
    SlipstreamError,
    UnavailableError,
    WorkerLostError,
)
from slipstream.settings import AdmissionSettings
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams

# Answers one request may ask for: its prompts times `n`.
MAX_ANSWERS = 256
# What a client may as well wait when no worker is there: about the time a worker needs to be seen again.
_NO_WORKER_RETRY_S = 2.0
INTERNAL_ERROR = SlipstreamError("The server had an error while processing your request; the logs have the details.")
"""What a client is told of an error nobody foresaw."""
_CLOSING = "The frontend is shutting down; another one, or this one in a moment, will answer."


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What a client asks, whichever face it came in by.

    Attributes:
        request_id: unique in the cluster; the answers' own ids are made from it.
        model: empty for the one served.
        sampling: as the client gave it, stop strings included.
        caller: whose key it came with, where there are keys.
        default_max_tokens: tokens when the client names no `max_tokens`; None is up to the context length.
        cache_salt: what the client keeps its prefix cache apart by; empty when it does not.
    """

    request_id: str
    model: str
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    where: Where
    n: int = 1
    default_max_tokens: int | None = None
    claim: Claim = DEFAULT_CLAIM
    cache_salt: str = ""
    caller: Caller | None = None


class AnswerDelta(msgspec.Struct, frozen=True):
    """A piece of one of the answers; `index` is the prompt's place times `n` plus the choice's."""

    index: int
    piece: AnswerPiece
    account: RequestAccount | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, summed over all answers; a prompt counts once however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Answer:
    """The running answer to one request: iterate over it once, then ask for its sums.

    Attributes:
        accounts: by index, of the answers that have one: all that came to their end by themselves.
    """

    request_id: str
    model: str
    size: int
    prompt_tokens: Sequence[int]
    deltas: AsyncIterator[AnswerDelta]
    accounts: dict[int, RequestAccount] = field(default_factory=dict)
    _completion_tokens: int = 0

    async def __aiter__(self) -> AsyncIterator[AnswerDelta]:
        async for delta in self.deltas:
            self._completion_tokens += len(delta.piece.arrived)
            if delta.account is not None:
                self.accounts[delta.index] = delta.account
            yield delta

    @property
    def usage(self) -> Usage:
        """As of now; final once the iteration is over."""
        each = self.size // len(self.prompt_tokens)
        first_accounts = (self.accounts.get(place * each) for place in range(len(self.prompt_tokens)))
        cached = (_cached_tokens(account) for account in first_accounts if account is not None)
        return Usage(sum(self.prompt_tokens), self._completion_tokens, sum(cached))


class InferenceService:
    """Answers requests for one model.

    Args:
        request_timeout_s: longest a request may take in all.
        max_n: largest `n` accepted.
        tenants: whose requests are whose; the faces ask it.
        cold: where requests wait while the planner starts a worker from zero; None: it never does.
        isolates_tenants: whether each tenant has a prefix cache of its own.
        clock: monotonic seconds, for the metrics.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        text_model: TextModel,
        *,
        model_name: str,
        request_timeout_s: float,
        max_n: int,
        tenants: Tenants | None = None,
        cold: ColdStarts | None = None,
        isolates_tenants: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dispatcher = dispatcher
        self.text_model = text_model
        self.model_name = model_name
        self.tenants = tenants or Tenants(AdmissionSettings())
        self.clock = clock
        self._cold = cold
        self._isolates_tenants = isolates_tenants
        self._request_timeout_s = request_timeout_s
        self.max_n = max_n
        self._open: set[asyncio.Timeout] = set()
        self.closing = False

    def close(self) -> None:
        """End every open request with `UnavailableError`, and refuse new ones with it: the process shuts down."""
        self.closing = True
        for deadline in self._open:
            if not deadline.expired():
                deadline.reschedule(asyncio.get_running_loop().time())

    def models(self) -> list[ServedModel]:
        """What this frontend serves now. The cluster may have other models, whose text it does not know."""
        return [model for model in self.dispatcher.models() if model.name == self.model_name]

    def served_model(self, name: str) -> ServedModel:
        """The model of that name as it is served now; ours when `name` is empty.

        Raises:
            ModelNotFoundError: this frontend serves no model of that name.
            NoWorkerError: it is ours, but no decode worker is ready.
        """
        wanted = name or self.model_name
        if wanted == self.model_name:
            for model in self.models():
                return model
            raise NoWorkerError(f"No decode worker for model '{wanted}' is ready.", retry_after_s=_NO_WORKER_RETRY_S)
        raise ModelNotFoundError(
            f"The model '{name}' does not exist; this frontend serves '{self.model_name}'.", param="model"
        )

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now, or after a worker that the planner starts for it."""
        return self.dispatcher.ready or (self._cold is not None and self._cold.starts(self.model_name))

    async def _started_model(self, request: InferenceRequest, left_s: float) -> ServedModel:
        """`served_model`, after a wait where the planner starts a worker for it."""
        try:
            return self.served_model(request.model)
        except NoWorkerError:
            if self._cold is None or not self._cold.starts(self.model_name):
                raise
        with stage("cold_start"):
            await self._cold.wait(
                self.model_name, request.claim.priority.label, left_s, served=lambda: bool(self.models())
            )
        return self.served_model(request.model)

    @asynccontextmanager
    async def answer(self, request: InferenceRequest) -> AsyncIterator[Answer]:
        """Begin to answer; the block reads the answer and owns it.

        Raises:
            InvalidRequestError, ModelNotFoundError, NotAllowedError, RateLimitError, UnavailableError: before anything
                was dispatched, or later from the iteration.
            DeadlineError: the request as a whole took too long.
        """
        received(self.clock)
        record = current() or RequestRecord(request.request_id, "", "", self.clock(), time.time_ns())
        record.service_class = request.claim.priority.label
        record.tenant = "" if request.claim.tenant == DEFAULT_TENANT else request.claim.tenant
        times = TokenTimes(request.where, record, self.clock)
        limit_s, limited_by = self._request_timeout_s, "frontend.request_timeout_s"
        if request.claim.timeout_s is not None and request.claim.timeout_s < limit_s:
            limit_s, limited_by = request.claim.timeout_s, "x-request-timeout-s"
        deadline = asyncio.timeout(limit_s)
        spending: Spending | None = None
        void = False
        try:
            async with deadline:
                self._open.add(deadline)
                if self.closing:
                    raise UnavailableError(_CLOSING, code="shutting_down")
                spending = self._let_in(request)
                model = await self._started_model(request, limit_s)
                self._check(request)
                record.model = model.name
                with stage("tokenize"):
                    prompts = [await self._token_ids(prompt) for prompt in request.prompts]
                record.prompt_tokens = sum(map(len, prompts))
                record.prompts = prompts if access_log.wants_prompts() else ()
                record.cache_salt = self._salt(request)
                sequences = self._sequences(request, model, prompts)
                record.sequences = len(sequences)
                if spending is not None and request.caller is not None:
                    request.caller.charge(spending, record.prompt_tokens, _most_output(request, spending, sequences))
                record.prefix = request.claim.prefix if len(prompts) == 1 else ""
                series(request.where).prompt.inc(record.prompt_tokens)
                streams = [
                    self._generate(index, sequence, request.sampling, times) for index, sequence in enumerate(sequences)
                ]
                async with merged(streams) as deltas:
                    answer = Answer(request.request_id, model.name, len(sequences), [*map(len, prompts)], deltas)
                    yield answer
                    record.cached_tokens = answer.usage.cached_tokens
                    record.fallback = next((each.fallback for each in answer.accounts.values() if each.fallback), "")
        except SlipstreamError as error:
            void = error.http_status in NOT_ITS_FAULT and not record.completion_tokens
            raise
        except TimeoutError as error:
            if not deadline.expired():
                raise
            if self.closing:
                raise UnavailableError(_CLOSING, code="shutting_down") from error
            raise DeadlineError(f"The request took longer than the {limit_s:g} s allowed ({limited_by}).") from error
        finally:
            times.close()
            self._open.discard(deadline)
            if spending is not None and request.caller is not None:
                with spending:
                    request.caller.settle(spending, record.completion_tokens, void=void)

    def _let_in(self, request: InferenceRequest) -> Spending | None:
        if request.caller is None:
            return None
        request.caller.check_model(request.model or self.model_name)
        return request.caller.enter()

    def _check(self, request: InferenceRequest) -> None:
        if not 1 <= request.n <= self.max_n:
            raise InvalidRequestError(f"Invalid 'n': {request.n} is not within 1 to {self.max_n}.", param="n")
        answers = request.n * len(request.prompts)
        if not 1 <= answers <= MAX_ANSWERS:
            raise InvalidRequestError(
                f"The request asks for {answers} answers (prompts times n); at least 1 and at most {MAX_ANSWERS} are "
                "allowed.",
                param="prompt",
            )
        for name, ids in (
            ("logit_bias", request.sampling.logit_bias),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            for token_id in ids:
                self._check_token_id(token_id, name)

    def _check_token_id(self, token_id: int, param: str) -> None:
        if token_id >= self.text_model.vocab_size:
            raise InvalidRequestError(
                f"Invalid '{param}': token id {token_id} is outside the model's vocabulary of "
                f"{self.text_model.vocab_size} tokens.",
                param=param,
            )

    async def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        match prompt:
            case TextPrompt():
                ids: Sequence[int] = await self.text_model.encode(prompt.text, add_special_tokens=True)
            case ChatPrompt():
                rendered = prompt.render(self.text_model.chat_template)
                ids = await self.text_model.encode(rendered, add_special_tokens=False)
            case TokenPrompt():
                ids = prompt.token_ids
                if ids:
                    self._check_token_id(max(ids), prompt.param)
        if not ids:
            raise InvalidRequestError("The prompt has no tokens; at least one is needed.", param=prompt.param)
        return ids

    def _sequences(
        self, request: InferenceRequest, model: ServedModel, prompts: Sequence[Sequence[int]]
    ) -> list[TokenRequest]:
        several, salt = request.n * len(prompts) > 1, self._salt(request)
        sequences = []
        for place, token_ids in enumerate(prompts):
            params = self._worker_params(request, model, len(token_ids), request.prompts[place])
            for choice in range(request.n):
                index = place * request.n + choice
                own = SamplingParams()
                own.CopyFrom(params)
                if params.HasField("seed"):
                    own.seed = _wrapped(params.seed + choice)
                request_id = f"{request.request_id}-{index}" if several else request.request_id
                sequence = TokenRequest(request_id, model.name, token_ids, own, request.claim, cache_salt=salt)
                sequences.append(sequence)
        return sequences

    def _salt(self, request: InferenceRequest) -> str:
        return salt_of(request.claim.tenant if self._isolates_tenants else "", request.cache_salt)

    def _worker_params(
        self, request: InferenceRequest, model: ServedModel, prompt_tokens: int, prompt: Prompt
    ) -> SamplingParams:
        """`TokenRequest.sampling` for one prompt: a length that fits, stop tokens, no strings."""
        params = SamplingParams()
        params.CopyFrom(request.sampling)
        params.ClearField("stop")
        self._apply_defaults(params)
        asked = params.max_tokens if params.HasField("max_tokens") else None
        room = model.max_model_len - prompt_tokens
        if room < 1 or (asked is not None and asked > room):
            raise context_length_error(prompt, prompt_tokens, asked, model.max_model_len)
        params.max_tokens = asked if asked is not None else min(room, request.default_max_tokens or room)
        if params.min_tokens > params.max_tokens:
            raise InvalidRequestError(
                f"Invalid 'min_tokens': {params.min_tokens} is more than the {params.max_tokens} tokens the answer "
                "may have (max_tokens).",
                param="min_tokens",
            )
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.text_model.eos_token_ids
        params.stop_token_ids[:] = sorted(stop_ids)
        return params

    def _apply_defaults(self, params: SamplingParams) -> None:
        said = {field.name for field, _ in params.ListFields()}
        for name, value in self.text_model.sampling_defaults.items():
            if name not in said:
                setattr(params, name, int(value) if name == "top_k" else value)

    async def _generate(
        self, index: int, request: TokenRequest, asked: SamplingParams, times: TokenTimes
    ) -> AsyncGenerator[AnswerDelta, None]:
        text = AnswerText(
            self.text_model.detokenizer(),
            stop=asked.stop,
            min_tokens=request.sampling.min_tokens,
            stop_token_ids=frozenset(request.sampling.stop_token_ids),
        )
        account: RequestAccount | None = None
        last: AnswerPiece | None = None
        async with aclosing(self.dispatcher.generate(request)) as deltas:
            async for delta in deltas:
                account = delta.account or account
                piece = text.feed(delta)
                times.arrived(index, len(piece.arrived))
                if piece.finished:
                    last = piece
                    break
                yield AnswerDelta(index, piece)
        # The workers are told before the client is: a stop string leaves nothing running.
        if last is None or last.finish_reason == FinishReason.FINISH_REASON_ABORT:
            raise WorkerLostError(f"The worker gave up request {request.request_id} before its end.")
        yield AnswerDelta(index, last, account)


def _most_output(request: InferenceRequest, spending: Spending, sequences: Sequence[TokenRequest]) -> int:
    """Tokens to hold of the key's rate: all that the client asked for, or a guess where it named no limit."""
    said = request.sampling.HasField("max_tokens") or request.default_max_tokens is not None
    most = spending.key.rates.reserve_output_tokens
    return sum(one.sampling.max_tokens if said else min(one.sampling.max_tokens, most) for one in sequences)


def _cached_tokens(account: RequestAccount) -> int:
    """Prompt tokens that no worker computed. The one token decode repeats after a handoff was computed before."""
    computed = max(account.prefill_computed_tokens, account.decode_computed_tokens)
    return max(0, account.prompt_tokens - computed)


def _wrapped(seed: int) -> int:
    """Into the 64 bits a seed has."""
    return (seed + INT64_MAX + 1) % (1 << 64) - INT64_MAX - 1
