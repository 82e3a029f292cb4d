"""One request at the gate: its place in the queue, and how it is taken from the workers without its client noticing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

from frontend.admission.accounts import AdmissionAccount
from frontend.admission.claim import Entry
from frontend.admission.demand import Demand
from frontend.generation import TokenDelta, TokenRequest
from frontend.progress import Progress
from slipstream.errors import SlipstreamError


class PausedError(Exception):
    """The request was taken from the workers; it waits for its turn again. Never leaves the gate."""


@dataclass(slots=True, eq=False, kw_only=True)
class HeldRequest(Entry):
    """An entry with its request and, while it waits, a future.

    Attributes:
        account: what is remembered of it when it is gone.
        progress: what was generated; kept of those requests only that may be preempted.
        turn: done when it may go to the workers, or with the error that ends it.
        answered: whether tokens came since it was sent.
        finished: whether the answer is complete.
        successors: what was granted its place when it was preempted, and waits for it to leave.
    """

    request: TokenRequest
    demand: Demand
    account: AdmissionAccount
    progress: Progress | None = None
    turn: asyncio.Future[SlipstreamError | None] | None = None
    answered: bool = False
    finished: bool = False
    successors: list[HeldRequest] = field(default_factory=list)
    _paused: bool = False
    _reading: asyncio.Timeout | None = None

    @property
    def pausable(self) -> bool:
        """Whether it waits for its next tokens, and another worker would go on from them as this one would."""
        progress = self.progress
        if progress is None or self._reading is None or self._paused or self.finished:
            return False
        if not progress.generated:
            return True
        return progress.continuable() and progress.finished_unsaid() is None

    def key(self) -> int:
        return hash((self.claim.tenant, self.claim.priority, tuple(self.request.token_ids)))

    def pause(self, loop: asyncio.AbstractEventLoop) -> None:
        """Break off the wait for tokens. Only where `pausable` was true at this moment."""
        assert self._reading is not None, "not pausable"
        self._paused = True
        self._reading.reschedule(loop.time())
        self.turn = loop.create_future()

    def recount(self) -> None:
        assert self.progress is not None, "not pausable"
        sampling = self.request.sampling
        max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
        cost = self.demand.cost(len(self.request.token_ids), len(self.progress.generated), max_tokens)
        self.work, self.prompt_work, self.kv_tokens = cost.work, cost.prompt_work, cost.kv_tokens

    def next_request(self, on_computed: Callable[[], None]) -> TokenRequest:
        """What is sent: the request, or after a pause what is left of it, under a name that no worker knows yet."""
        self._paused = self.answered = False
        if self.progress is None or not self.preemptions:
            return replace(self.request, on_computed=on_computed)
        job = self.progress.job()
        return replace(
            self.request,
            request_id=f"{self.request.request_id}-{self.preemptions}",
            token_ids=job.token_ids,
            sampling=job.sampling,
            on_computed=on_computed,
        )

    async def read(self, stream: AsyncGenerator[TokenDelta, None]) -> TokenDelta:
        """The next tokens, of a request that may be paused.

        Raises:
            PausedError: it was paused.
            StopAsyncIteration: there are no more.
        """
        if self._paused:
            raise PausedError
        try:
            async with asyncio.timeout(None) as self._reading:
                return await anext(stream)
        except TimeoutError:
            if not self._paused:
                raise
            raise PausedError from None
        finally:
            self._reading = None

    def note(self, delta: TokenDelta) -> None:
        """Tokens came."""
        self.tokens += len(delta.token_ids)
        self.answered = True
        if delta.finish_reason:
            self.finished = True
            self.demand.note_answer(self.tokens)
        if self.progress is None:
            return
        self.progress.generated.extend(delta.token_ids)
        if delta.account is not None and self.preemptions:
            delta.account.prompt_tokens = len(self.request.token_ids)
            delta.account.attempts += self.preemptions
