"""When a prefill worker should fetch the beginning of a prompt from a decode worker instead of computing it.

In a conversation the last answer's KV blocks lie on the decode worker that generated it. The next prompt begins
with them, and its prefill worker would compute them a second time. Pure: records, what is known and a rate go in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from frontend import paths
from frontend.router import Ask, Candidate, takes_requests
from slipstream.v1.registry_pb2 import Role, WorkerRecord

MIN_BLOCKS = 2
"""Fewer blocks than this are computed: a call, a connection and a lease are not worth them."""

START_TOKENS_PER_S = 2000.0
"""What a prefill worker is taken to compute before it has computed anything."""

DECAY = 0.9
"""What an earlier prompt weighs in the rate after each newer one."""


@dataclass(frozen=True, slots=True)
class WriteBack:
    """A decode worker that hands the first `tokens` tokens (whole blocks) of a prompt over."""

    source: WorkerRecord
    tokens: int


@dataclass(slots=True)
class _Work:
    tokens: float = START_TOKENS_PER_S
    seconds: float = 1.0


@dataclass(slots=True)
class PrefillRates:
    """Tokens a second that each prefill worker computes, its queue included: a decaying mean over its prompts."""

    _work: dict[str, _Work] = field(default_factory=dict)

    def note(self, worker_id: str, computed_tokens: int, seconds: float) -> None:
        """A prompt was computed. One that was cached altogether says nothing."""
        if computed_tokens == 0 or seconds <= 0:
            return
        work = self._work.setdefault(worker_id, _Work())
        work.tokens = DECAY * work.tokens + computed_tokens
        work.seconds = DECAY * work.seconds + seconds

    def of(self, worker_id: str) -> float:
        """Tokens a second."""
        work = self._work.get(worker_id, _Work())
        return work.tokens / work.seconds

    def forget_all_but(self, worker_ids: set[str]) -> None:
        """Drop workers that are gone."""
        for worker_id in self._work.keys() - worker_ids:
            del self._work[worker_id]


def plan(ask: Ask, prefill: WorkerRecord, candidates: Sequence[Candidate], *, tokens_per_s: float) -> WriteBack | None:
    """The write-back that saves the prefill worker the most time; None when computing is as fast.

    Args:
        prefill: the worker that was chosen to compute the prompt, at `tokens_per_s`.
    """
    has = ask.known.get(prefill.worker_id, 0)
    best, best_saved_s = None, 0.0
    for one in candidates:
        record = one.record
        tokens = ask.known.get(record.worker_id, 0)
        if tokens - has < MIN_BLOCKS * prefill.capacity.block_tokens or not _can_send(ask, one, prefill):
            continue
        blocks = (tokens - has) // prefill.capacity.block_tokens
        moved_s = paths.transfer_s(prefill, record, blocks * prefill.capacity.block_bytes)
        saved_s = (tokens - has) / tokens_per_s - moved_s
        if saved_s > best_saved_s:
            best, best_saved_s = WriteBack(record, tokens), saved_s
    return best


def _can_send(ask: Ask, one: Candidate, prefill: WorkerRecord) -> bool:
    return (
        one.record.role == Role.ROLE_DECODE
        and one.record.model == ask.model
        and takes_requests(one, ask.excluded)
        and prefill.capacity.block_tokens > 0
        and one.record.capacity.block_tokens == prefill.capacity.block_tokens
        and paths.usable(prefill, one.record)
    )
