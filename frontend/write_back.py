"""When a prefill worker should fetch the beginning of a prompt from a decode worker instead of computing it.

In a conversation the last answer's KV blocks lie on the decode worker that generated it. The next prompt begins
with them, and its prefill worker would compute them a second time. Pure; it predicts as the router does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frontend.router.ask import Ask
from frontend.router.candidate import Candidate
from frontend.router.fleet import Fleet
from frontend.router.ways import way
from slipstream.v1.registry_pb2 import Role, WorkerRecord

MIN_BLOCKS = 2
"""Fewer blocks than this are computed: a call, a connection and a lease are not worth them."""

MAX_SOURCES = 4
"""Workers looked at, those that know most of the prompt first."""


@dataclass(frozen=True, slots=True)
class WriteBack:
    """A decode worker that hands the first `tokens` tokens (whole blocks) of a prompt over."""

    source: WorkerRecord
    tokens: int


def plan(ask: Ask, prefill: WorkerRecord, fleet: Fleet) -> WriteBack | None:
    """The write-back that saves the prefill worker the most time; None when computing is as fast.

    Args:
        prefill: the worker that was chosen to compute the prompt.
    """
    computes, decodes = fleet.get(prefill.worker_id), fleet.pool(ask.model, Role.ROLE_DECODE)
    if computes is None or not decodes or prefill.capacity.block_tokens == 0:
        return None
    known = decodes.known(ask)
    if known is None:
        return None
    own = computes.pool.known(ask)
    has = 0 if own is None else int(own[computes.row])
    known = np.where(decodes.usable(ask), known, 0.0)
    best, best_saved_s = None, 0.0
    for row in np.argsort(-known, kind="stable")[:MAX_SOURCES]:
        source, tokens = decodes.members[row], int(known[row])
        if tokens - has < MIN_BLOCKS * prefill.capacity.block_tokens:
            break
        saved_s = _saved_s(ask, computes, source, has, tokens)
        if saved_s > best_saved_s:
            best, best_saved_s = WriteBack(source.record, tokens), saved_s
    return best


def _saved_s(ask: Ask, computes: Candidate, source: Candidate, has: int, tokens: int) -> float:
    """Seconds of computation less those of the transfer; 0 when there is no way."""
    capacity = computes.record.capacity
    the_way = way(computes, source)
    if the_way is None or source.record.capacity.block_tokens != capacity.block_tokens:
        return 0.0
    compute_s = computes.curve.predictor.prefill_s
    spared_s = compute_s(ask.prompt_tokens - has, has) - compute_s(ask.prompt_tokens - tokens, tokens)
    moved_bytes = (tokens - has) // capacity.block_tokens * capacity.block_bytes
    return spared_s * computes.prefill.factor - the_way.latency_s - moved_bytes / the_way.bytes_per_s
