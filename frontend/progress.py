"""How far one request has come over all its attempts: what was generated, what failed, what may still be tried.

Pure data; the time and every event are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from frontend.attempt import Attempt, Job
from frontend.generation import TokenDelta, TokenRequest
from frontend.migration_metrics import Stage
from frontend.resumption import Way, continuable, rest_of, way
from frontend.router import Ask, Fallback, Route, alone
from frontend.worker_failure import FailureKind, WorkerFailure
from slipstream.errors import MigrationLimitError, WorkerLostError
from slipstream.v1.registry_pb2 import Role
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, TokenLogprobs
from slipstream.v1.worker_pb2 import DecodeEvent

_ABORT = FinishReason.FINISH_REASON_ABORT  # protobuf would look it up by its name each time


class ReplayDiverged(Exception):  # noqa: N818 - not an error of the request: it goes on in another way
    """The answer that was made again is not the one that was sent; never leaves the dispatcher."""


@dataclass(slots=True)
class Progress:
    """One request on its way.

    Attributes:
        max_attempts: dispatches, those not counted that ended with a lost worker.
        deadline_s: the clock's time at which the whole request must have ended.
        max_migrations: workers that may be lost with the request on board.
        attempts: dispatches so far.
        lost: workers that were lost so far.
        last_failure: the newest one of a decode worker.
        after: the newest one of any, in words.
        silent_since_s: of what the client has, the last came then; None while the answer comes as it should.
        silent_stage: how far the request was then.
        noted_fallback: the one that was counted and logged; one request counts once.
    """

    request: TokenRequest
    max_attempts: int
    deadline_s: float
    max_migrations: int = 0
    attempts: int = 0
    lost: int = 0
    generated: list[int] = field(default_factory=list)
    last_failure: WorkerFailure | None = None
    after: str = ""
    silent_since_s: float | None = None
    silent_stage: Stage = Stage.PREFILL
    noted_fallback: Fallback | None = None
    _failed: dict[tuple[str, int], FailureKind] = field(default_factory=dict)
    _prefill_failure: WorkerFailure | None = None
    _decode_alone: bool = False
    _first: Attempt | None = None
    """The attempt that began the answer."""
    _replayed: int | None = None
    """Tokens that came again in this attempt; None while it does not replay."""
    _diverged: bool = False
    _made_again: int = 0
    """Tokens that this attempt generated for the second time."""
    _recomputed_tokens: int = 0

    @property
    def way(self) -> Way:
        """How the answer goes on in another attempt, if it has begun."""
        return way(self.request.sampling, reproducible=not self._diverged)

    def ask(self, is_out: Callable[[str, int, FailureKind], bool]) -> Ask:
        """The question for the router: workers that failed this request are out.

        Args:
            is_out: whether the worker of that id still is the incarnation of that epoch that failed so.
        """
        tokens, left = len(self.request.token_ids), self.remaining_tokens() or 0
        excluded = frozenset(one for (one, epoch), kind in self._failed.items() if is_out(one, epoch, kind))
        if self.generated and self.way is Way.REPLAYED:
            return Ask(self.request.model, tokens, left + len(self.generated), excluded)
        return Ask(self.request.model, tokens + len(self.generated), left, excluded)

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
        request, token_ids, sampling = self.request, self.request.token_ids, self.request.sampling
        self._replayed = None
        if self.generated:
            if self.way is Way.REPLAYED:
                self._replayed = 0
            else:
                token_ids, sampling = [*token_ids, *self.generated], rest_of(sampling, self.generated)
        name = request.request_id if self.attempts <= 1 else f"{request.request_id}~{self.attempts}"
        return Job(request.request_id, name, request.model, token_ids, sampling, self.deadline_s, request.cache_salt)

    def accept(self, event: DecodeEvent, attempt: Attempt) -> TokenDelta | None:
        """An event of the decode worker becomes what the face gets; None for one that brings nothing new.

        Raises:
            WorkerFailure: the worker has given the request up.
            ReplayDiverged: an answer that is made again becomes another one.
        """
        if event.finish_reason == _ABORT:
            worker = attempt.route.decode
            aborted = WorkerLostError(f"decode worker {worker.worker_id} aborted the request")
            raise WorkerFailure(worker, FailureKind.FAILED, aborted)
        account = self._account(event.account, attempt) if event.finish_reason or not self.generated else None
        if account is not None and not event.finish_reason:
            # All that is known now, for an answer that a stop string ends: it has no last event.
            account.partial = True
        if self._first is None:
            self._first = attempt
        token_ids: Sequence[int] = event.token_ids
        logprobs: Sequence[TokenLogprobs] = event.logprobs
        if self._replayed is not None:
            known = self._check_replay(event, self._replayed)
            token_ids, logprobs = token_ids[known:], logprobs[known:]
            if not token_ids and not event.finish_reason:
                return None
        self.generated.extend(token_ids)
        return TokenDelta(token_ids, logprobs, event.finish_reason, event.stop_reason, account)

    def _check_replay(self, event: DecodeEvent, replayed: int) -> int:
        """How many of these tokens the client has; the last of them ends the replay."""
        known = self.generated[replayed : replayed + len(event.token_ids)]
        self._replayed = replayed = replayed + len(known)
        self._made_again += len(known)
        whole = replayed == len(self.generated)
        if list(event.token_ids[: len(known)]) != known or (event.finish_reason and not whole):
            self._diverged = True
            raise ReplayDiverged
        if whole:
            self._replayed = None
        return len(known)

    def failed(self, failure: WorkerFailure) -> None:
        """Take note of a failure; returns if the request may be dispatched again.

        Raises:
            SlipstreamError: it may not; the error is the client's.
        """
        worker = failure.worker
        self._failed[worker.worker_id, worker.epoch] = failure.kind
        self.after = f"{failure.role} {worker.worker_id} {failure.kind.value}"
        if worker.role == Role.ROLE_PREFILL:
            self._prefill_failure = failure
            self._decode_alone = self.attempts >= self.max_attempts
        else:
            self.last_failure = failure
        if failure.kind.fatal:
            self.lost += 1
            if self.lost > self.max_migrations:
                raise MigrationLimitError(
                    f"{self.lost} workers were lost while they had this request, the last one {failure.role} worker "
                    f"{worker.worker_id} ({failure.cause.message}); it is not sent to another one "
                    f"(frontend.max_migrations = {self.max_migrations})"
                ) from failure
        elif worker.role != Role.ROLE_PREFILL and self.attempts - self.lost >= self.max_attempts:
            raise failure.as_error(f"the request was dispatched {self.attempts} times") from failure

    def note_silence(self, attempt: Attempt, stage: Stage) -> None:
        """An attempt failed: nothing comes until the next one brings something."""
        if self.silent_since_s is None:
            self.silent_since_s = attempt.began_s + (attempt.last_s if attempt.tokens_came else 0.0)
            self.silent_stage = stage

    def note_recomputed(self, attempt: Attempt) -> int:
        """An attempt after a lost one has ended: tokens that went through a model again, as far as that is known."""
        computed = self._again(attempt, attempt.decode_computed_tokens or 0)
        self._recomputed_tokens, self._made_again = self._recomputed_tokens + computed, 0
        return computed

    def _again(self, attempt: Attempt, decode_computed_tokens: int) -> int:
        prefill_computed_tokens = attempt.computed.computed_tokens if attempt.computed is not None else 0
        return max(prefill_computed_tokens, decode_computed_tokens) + self._made_again

    def stage_of(self, failure: WorkerFailure) -> Stage:
        """How far the request had come when its worker failed."""
        if self.generated:
            return Stage.ANSWER
        return Stage.PREFILL if failure.worker.role == Role.ROLE_PREFILL else Stage.FIRST_TOKEN

    def continuable(self) -> bool:
        """Whether another worker, given prompt and tokens so far, goes on as the first one would have."""
        return continuable(self.request.sampling)

    def finished_unsaid(self) -> TokenDelta | None:
        """The end of an answer whose tokens all came but whose worker died before it said so."""
        if not self.generated:
            return None
        last = self.generated[-1]
        sampling = self.request.sampling
        if last in sampling.stop_token_ids and len(self.generated) >= sampling.min_tokens:
            return TokenDelta((), (), FinishReason.FINISH_REASON_STOP, str(last), self._own_account())
        if self.remaining_tokens() == 0:
            return TokenDelta((), (), FinishReason.FINISH_REASON_LENGTH, "", self._own_account())
        return None

    def remaining_tokens(self) -> int | None:
        """Tokens that may still be generated; None without a limit."""
        sampling = self.request.sampling
        return max(0, sampling.max_tokens - len(self.generated)) if sampling.HasField("max_tokens") else None

    def _account(self, decodes: RequestAccount, attempt: Attempt) -> RequestAccount:
        account = self._own_account()
        account.MergeFrom(decodes)
        account.prompt_tokens = len(self.request.token_ids)
        account.attempts = self.attempts
        account.decode_worker = attempt.route.decode.worker_id
        first = self._first
        if first is not None and first is not attempt:
            self._as_first_served(account, first, attempt)
        elif attempt.route.prefill is not None and attempt.computed is not None:
            account.prefill_worker = attempt.route.prefill.worker_id
            account.prefill_computed_tokens = attempt.computed.computed_tokens
            account.prefill_cached_tokens = attempt.computed.cached_tokens
            account.prefill_s = attempt.prefill_s
        if attempt.route.fallback is not None:
            account.fallback = attempt.route.fallback
        return account

    def _as_first_served(self, account: RequestAccount, first: Attempt, attempt: Attempt) -> None:
        """What the prompt cost is what it cost before the answer began: a client shall not pay for our losses."""
        account.recomputed_tokens = self._recomputed_tokens + self._again(attempt, account.decode_computed_tokens)
        if first.computed is None:
            account.decode_computed_tokens = min(account.decode_computed_tokens, len(self.request.token_ids))
            return
        assert first.route.prefill is not None, "somebody computed it"
        account.prefill_worker = first.route.prefill.worker_id
        account.prefill_computed_tokens = first.computed.computed_tokens
        account.prefill_cached_tokens = first.computed.cached_tokens
        account.prefill_s = first.prefill_s
        account.decode_computed_tokens = min(1, account.decode_computed_tokens)
        account.decode_cached_tokens = min(account.decode_cached_tokens, len(self.request.token_ids))

    def _own_account(self) -> RequestAccount:
        account = RequestAccount(
            prompt_tokens=len(self.request.token_ids), attempts=self.attempts, migrations=self.lost
        )
        if self.last_failure is not None:
            account.decode_worker = self.last_failure.worker.worker_id
        return account
