"""What was decided for the last requests, why, and what came of it: the answer to `slipstream explain REQUEST_ID`.

Bounded (a record takes some 2 KB), in memory and each process's own: a record of yesterday is the access log's
business.
"""

from __future__ import annotations

import msgspec

from frontend.last_requests import KEPT, LastRequests
from frontend.router.ask import Ask
from frontend.router.learning import Outcome
from frontend.router.route import Considered, Route


class Parts(msgspec.Struct, frozen=True):
    """One choice and the parts of its predicted cost, in seconds; see `frontend.router.route.Predicted`."""

    prefill_worker: str
    decode_worker: str
    new_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float
    slot_s: float
    itl_s: float
    output_tokens: float
    others_s: float
    ttft_s: float
    cost_s: float


class Actual(msgspec.Struct, frozen=True):
    """What was seen. None: not seen, or not yet."""

    prefill_s: float | None = None
    ttft_s: float | None = None
    itl_s: float | None = None
    computed_tokens: int | None = None
    tokens: int = 0


class Decision(msgspec.Struct, kw_only=True):
    """One dispatch of one sequence.

    Attributes:
        after: of a dispatch that another one's end made necessary: who failed, and how.
        resumes: tokens of the answer that its client had by then.
        considered: the best choices, the first one was taken; empty where the policy predicts nothing.
        actual: None until the dispatch has ended.
    """

    request_id: str
    unix_s: float
    model: str
    policy: str
    prompt_tokens: int
    max_tokens: int
    attempt: int
    prefill_worker: str
    decode_worker: str
    reason: str
    fallback: str
    excluded: tuple[str, ...]
    suspects: tuple[str, ...]
    considered: tuple[Parts, ...]
    after: str = ""
    resumes: int = 0
    actual: Actual | None = None


class Decisions:
    """The last decisions by request id, the oldest dropped first. Plain data."""

    def __init__(self, *, kept: int = KEPT) -> None:
        self._last: LastRequests[Decision] = LastRequests(kept)

    def __len__(self) -> int:
        return len(self._last)

    def record(self, request_id: str, ask: Ask, route: Route, policy: str, unix_s: float) -> Decision:
        """A request is dispatched."""
        decision = Decision(
            request_id=request_id,
            unix_s=unix_s,
            model=ask.model,
            policy=policy,
            prompt_tokens=ask.prompt_tokens,
            max_tokens=ask.max_tokens,
            attempt=len(self._last.exact(request_id)) + 1,
            prefill_worker=route.prefill.worker_id if route.prefill is not None else "",
            decode_worker=route.decode.worker_id,
            reason=route.reason,
            fallback=route.fallback or "",
            excluded=tuple(sorted(ask.excluded)),
            suspects=tuple(sorted(ask.suspects)),
            considered=tuple(map(_parts, route.considered)),
        )
        self._last.add(request_id, decision)
        return decision

    def open_of(self, request_id: str) -> Decision | None:
        """The last dispatch of this very id that has not ended."""
        return next((one for one in reversed(self._last.exact(request_id)) if one.actual is None), None)

    def of(self, request_id: str) -> list[Decision]:
        """All dispatches of a request; see `LastRequests.of`."""
        return self._last.of(request_id)


def actual(outcome: Outcome) -> Actual:
    """An outcome as it is shown."""
    return Actual(outcome.prefill_s, outcome.ttft_s, outcome.itl_s, outcome.computed_tokens, outcome.tokens)


def _parts(one: Considered) -> Parts:
    what = one.predicted
    return Parts(
        prefill_worker=one.prefill,
        decode_worker=one.decode,
        new_tokens=what.new_tokens,
        queue_s=what.queue_s,
        prefill_s=what.prefill_s,
        transfer_s=what.transfer_s,
        slot_s=what.slot_s,
        itl_s=what.itl_s,
        output_tokens=what.output_tokens,
        others_s=what.others_s,
        ttft_s=what.ttft_s,
        cost_s=what.cost_s,
    )
