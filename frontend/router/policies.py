"""The policies that do not predict: by session, by load, in turns, and the better of two.

Each gives every worker of a pool a score; the pair with the least scores that can exchange blocks is taken, decode's
score first. They are for comparison, and for those who want to know
beforehand where a request goes.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
from xxhash import xxh3_64_intdigest

from frontend.router.ask import Ask
from frontend.router.cost import fits
from frontend.router.fleet import Fleet
from frontend.router.pairs import connected
from frontend.router.pool import Pool
from frontend.router.route import Fallback, Reason, Route
from frontend.router.speeds import Vector
from slipstream.v1.registry_pb2 import Role

Score = Callable[[Pool], Vector]
"""Of each worker of a pool, by row; the least is the best."""

LOAD_BOUND = 1.25
"""A session's own worker is passed over when it has this many times the mean load, and one request more (consistent
hashing with bounded loads; Mirrokni, Thorup and Zadimoghaddam, 2016)."""

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def by_load(ask: Ask, fleet: Fleet) -> Route:
    """Where the least waits: prompts for prefill, requests for decode."""
    return scored(ask, fleet, prefill_load, decode_load, Reason.LEAST_LOAD)


def by_turns(ask: Ask, fleet: Fleet, turn: int) -> Route:
    """One after the other."""

    def score(pool: Pool) -> Vector:
        order = np.argsort(np.argsort(pool.hashes))
        return ((order - turn) % len(pool)).astype(np.float64)

    return scored(ask, fleet, score, score, Reason.ROUND_ROBIN)


def by_power_of_two(ask: Ask, fleet: Fleet, random: Random) -> Route:
    """The less loaded of two that are drawn (Mitzenmacher, The Power of Two Choices, 2001)."""

    def drawn(pool: Pool, load: Vector) -> Vector:
        usable = np.flatnonzero(pool.usable(ask))
        chosen = random.sample(range(len(usable)), min(2, len(usable)))
        score: Vector = load + load.max() + 1.0  # the others, for when neither of the two can be used
        score[usable[chosen]] = load[usable[chosen]]
        return score

    return scored(
        ask,
        fleet,
        lambda pool: drawn(pool, prefill_load(pool)),
        lambda pool: drawn(pool, decode_load(pool)),
        Reason.POWER_OF_TWO,
    )


def by_session(ask: Ask, fleet: Fleet) -> Route:
    """The same workers for the same session, as long as they are not much busier than the others.

    Rendezvous hashing: when a worker comes or goes, only its own sessions move. No state, and every frontend says
    the same.
    """
    session = np.uint64(xxh3_64_intdigest(ask.session.encode()))

    def score(pool: Pool) -> Vector:
        mixed = pool.hashes ^ session
        for factor in _MIX:  # the finalizer of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(30))) * factor
        rank = (mixed ^ (mixed >> np.uint64(31))).astype(np.float64) / 2.0**64
        busy = pool.requests > LOAD_BOUND * pool.requests.mean() + 1.0
        score: Vector = np.where(busy, 1.0, 0.0) + rank
        return score

    return scored(ask, fleet, score, score, Reason.SESSION)


def prefill_load(pool: Pool) -> Vector:
    """Seconds of prompts that wait, whatever is cached; then this frontend's order."""
    return pool.pending_s + pool.foreign_s + 1e-6 * pool.tie


def decode_load(pool: Pool) -> Vector:
    """Requests, then use of the KV cache in tenths, then this frontend's order."""
    use = np.round(pool.used_blocks / np.maximum(pool.blocks, 1.0), 1)
    load: Vector = pool.requests + 0.1 * use + 1e-3 * pool.tie
    return load


def scored(ask: Ask, fleet: Fleet, prefill_score: Score, decode_score: Score, reason: str) -> Route:
    """The route of least scores. Workers that cannot take the request, or cannot be a pair, are left out here."""
    decodes = fleet.pool(ask.model, Role.ROLE_DECODE)
    assert decodes, "checked before a policy is asked"
    usable = fits(decodes, decodes.usable(ask), ask.prompt_tokens + ask.max_tokens)
    decode_scores = np.where(usable, decode_score(decodes), np.inf)
    alone = decodes.members[int(decode_scores.argmin())].record
    if ask.prompt_tokens <= 1:
        return Route(alone, None, Reason.NOTHING_TO_MOVE)
    prefills = fleet.pool(ask.model, Role.ROLE_PREFILL)
    if not prefills or not prefills.usable(ask).any():
        return Route(alone, None, Reason.DECODE_ALONE, Fallback.NO_PREFILL_WORKER)
    usable = fits(prefills, prefills.usable(ask), ask.prompt_tokens)
    prefill_scores = np.where(usable, prefill_score(prefills), np.inf)
    for prefill, decode, _ in connected(prefills, prefill_scores, decodes, decode_scores):
        known = prefills.known(ask)
        new_tokens = ask.prompt_tokens - (0 if known is None else int(known[prefill]))
        return Route(decodes.members[decode].record, prefills.members[prefill].record, reason, None, new_tokens)
    return Route(alone, None, Reason.DECODE_ALONE, Fallback.NO_PATH)
