"""How far one request has come over all its attempts: what was generated, what failed, what may still be tried.

Pure data; the time and every event are passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from frontend.attempt import Attempt, Job
from frontend.generation import TokenDelta, TokenRequest
from frontend.router import RETRY_AFTER_S, Ask, Fallback, Route, alone
from frontend.worker_failure import FailureKind, WorkerFailure
from slipstream.errors import WorkerLostError
from slipstream.v1.registry_pb2 import Role
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams
from slipstream.v1.worker_pb2 import DecodeEvent

_ABORT = FinishReason.FINISH_REASON_ABORT  # protobuf would look it up by its name each time


@dataclass(slots=True)
class Progress:
    """One request on its way.

    Attributes:
        attempts: dispatches so far.
        deadline_s: the clock's time at which the whole request must have ended.
        last_failure: the newest one of a decode worker.
        noted_fallback: the one that was counted and logged; one request counts once.
    """

    request: TokenRequest
    max_attempts: int
    deadline_s: float
    attempts: int = 0
    generated: list[int] = field(default_factory=list)
    last_failure: WorkerFailure | None = None
    noted_fallback: Fallback | None = None
    _failed: set[str] = field(default_factory=set)
    _prefill_failure: WorkerFailure | None = None
    _decode_alone: bool = False

    def ask(self) -> Ask:
        """The question for the router: workers that failed this request are out."""
        tokens = len(self.request.token_ids) + len(self.generated)
        return Ask(self.request.model, tokens, self.remaining_tokens() or 0, frozenset(self._failed))

    def settle(self, route: Route) -> Route:
        """The route as it is taken: decode alone when the tries are used up, with the true reason for it."""
        if self._prefill_failure is None:
            return route
        if route.prefill is not None and not self._decode_alone:
            return route
        if len(self.request.token_ids) + len(self.generated) <= 1:
            return route
        return alone(route, self._prefill_failure.fallback)

    def job(self) -> Job:
        """What the next attempt sends."""
        request = self.request
        token_ids: Sequence[int] = [*request.token_ids, *self.generated] if self.generated else request.token_ids
        return Job(request.request_id, request.model, token_ids, self._remaining_sampling(), self.deadline_s)

    def accept(self, event: DecodeEvent, attempt: Attempt) -> TokenDelta:
        """An event of the decode worker becomes what the face gets."""
        if event.finish_reason == _ABORT:
            worker = attempt.route.decode
            aborted = WorkerLostError(f"decode worker {worker.worker_id} aborted the request")
            raise WorkerFailure(worker, FailureKind.FAILED, aborted)
        account = self._account(event.account, attempt) if event.finish_reason or not self.generated else None
        if account is not None and not event.finish_reason:
            # All that is known now, for an answer that a stop string ends: it has no last event.
            account.partial = True
        self.generated.extend(event.token_ids)
        return TokenDelta(event.token_ids, event.logprobs, event.finish_reason, event.stop_reason, account)

    def failed(self, failure: WorkerFailure) -> None:
        """Take note of a failure; returns if the request may be dispatched again.

        Raises:
            SlipstreamError: it may not; the error is the client's.
        """
        self._failed.add(failure.worker.worker_id)
        if failure.worker.role == Role.ROLE_PREFILL:
            self._prefill_failure = failure
            self._decode_alone = self.attempts >= self.max_attempts
            return
        self.last_failure = failure
        if self.attempts >= self.max_attempts:
            raise failure.as_error(f"the request was dispatched {self.attempts} times") from failure
        if self.generated and not self.continuable():
            raise WorkerLostError(
                f"decode worker {failure.worker.worker_id} was lost in the middle of the answer "
                f"({failure.cause.message}); one with a seed, penalties or min_tokens cannot go on elsewhere",
                retry_after_s=RETRY_AFTER_S,
            ) from failure

    def continuable(self) -> bool:
        """Whether another worker, given prompt and tokens so far, goes on as the first one would have."""
        sampling = self.request.sampling
        seeded = sampling.HasField("seed") and not (sampling.HasField("temperature") and sampling.temperature == 0)
        # Penalties look at what was generated, which for the next worker is part of the prompt.
        penalized = (
            sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or (sampling.HasField("repetition_penalty") and sampling.repetition_penalty != 1)
        )
        return not seeded and not penalized and len(self.generated) >= sampling.min_tokens

    def finished_unsaid(self) -> TokenDelta | None:
        """The end of an answer whose tokens all came but whose worker died before it said so."""
        if not self.generated:
            return None
        last = self.generated[-1]
        if last in self.request.sampling.stop_token_ids:
            return TokenDelta((), (), FinishReason.FINISH_REASON_STOP, str(last), self._own_account())
        if self.remaining_tokens() == 0:
            return TokenDelta((), (), FinishReason.FINISH_REASON_LENGTH, "", self._own_account())
        return None

    def remaining_tokens(self) -> int | None:
        """Tokens that may still be generated; None without a limit."""
        sampling = self.request.sampling
        return max(0, sampling.max_tokens - len(self.generated)) if sampling.HasField("max_tokens") else None

    def _remaining_sampling(self) -> SamplingParams:
        if not self.generated:
            return self.request.sampling
        sampling = SamplingParams()
        sampling.CopyFrom(self.request.sampling)
        remaining = self.remaining_tokens()
        if remaining is not None:
            sampling.max_tokens = remaining
        sampling.ClearField("min_tokens")  # reached: see continuable
        return sampling

    def _account(self, decodes: RequestAccount, attempt: Attempt) -> RequestAccount:
        account = self._own_account()
        account.MergeFrom(decodes)
        account.prompt_tokens = len(self.request.token_ids)
        account.attempts = self.attempts
        account.decode_worker = attempt.route.decode.worker_id
        if attempt.route.prefill is not None and attempt.computed is not None:
            account.prefill_worker = attempt.route.prefill.worker_id
            account.prefill_computed_tokens = attempt.computed.computed_tokens
            account.prefill_cached_tokens = attempt.computed.cached_tokens
            account.prefill_s = attempt.prefill_s
        if attempt.route.fallback is not None:
            account.fallback = attempt.route.fallback
        return account

    def _own_account(self) -> RequestAccount:
        account = RequestAccount(prompt_tokens=len(self.request.token_ids), attempts=self.attempts)
        if self.last_failure is not None:
            account.decode_worker = self.last_failure.worker.worker_id
        return account
