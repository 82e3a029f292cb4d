"""The joint choice: the prefill and the decode worker whose common cost is least.

A pair's cost is the sum of two that are known for each worker alone, and of what depends on both: the transfer, and
the wait for a place on the decode worker as far as the prompt's computation does not cover it. So only the best of
each side need to be looked at together, and the best on one host with each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from frontend.router.ask import Ask
from frontend.router.candidate import Candidate, Way
from frontend.router.cost import DecodeCosts, PrefillCosts, predicted_pair
from frontend.router.pool import Pool
from frontend.router.route import Predicted
from frontend.router.speeds import Vector
from frontend.router.ways import exposed_s, way

BEST = 5
"""Workers of each side that are looked at together."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One choice of two workers. `ordered_s` is its cost with this frontend's order among equals."""

    prefill: int
    decode: int
    moved_s: float
    ordered_s: float


def best_pairs(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts) -> list[Pair]:
    """The best pairs that can exchange blocks, the best first; empty when there is no such pair."""
    pairs = [
        _pair(ask, prefills, decodes, prefill, decode, the_way)
        for prefill, decode in _rows(prefills, decodes)
        if (the_way := way(decodes.pool.members[decode], prefills.pool.members[prefill])) is not None
    ]
    if not pairs:
        found = next(connected(prefills.pool, prefills.usable_s, decodes.pool, decodes.usable_s), None)
        return [] if found is None else [_pair(ask, prefills, decodes, *found)]
    pairs.sort(key=lambda pair: pair.ordered_s)
    return pairs


def connected(
    prefills: Pool, prefill_costs: Vector, decodes: Pool, decode_costs: Vector
) -> Iterator[tuple[int, int, Way]]:
    """Rows of pairs that can exchange blocks, decode's cost first, and the way between them."""
    prefill_rows = [int(row) for row in np.argsort(prefill_costs, kind="stable") if prefill_costs[row] < np.inf]
    # Workers of one kind reach the same others, but for ways that were measured to be broken.
    hopeless = set[tuple[str, frozenset[str]]]()
    for decode in np.argsort(decode_costs, kind="stable"):
        one = decodes.members[decode]
        kind = one.record.host_id, one.transports
        if decode_costs[decode] == np.inf:
            return
        if kind in hopeless and not one.ways:
            continue
        found = False
        for prefill in prefill_rows:
            the_way = way(one, prefills.members[prefill])
            if the_way is not None:
                found = True
                yield prefill, int(decode), the_way
        if not found and not one.ways:
            hopeless.add(kind)


def explained(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts, pair: Pair) -> Predicted:
    """The parts of a pair's cost."""
    return predicted_pair(ask, prefills, pair.prefill, decodes, pair.decode, pair.moved_s)


def _rows(prefills: PrefillCosts, decodes: DecodeCosts) -> set[tuple[int, int]]:
    best_prefills, best_decodes = _least(prefills.usable_s), _least(decodes.usable_s)
    rows = {(prefill, decode) for prefill in best_prefills for decode in best_decodes}
    for decode in best_decodes:
        beside = _beside(decodes.pool.members[decode], prefills.pool, prefills.usable_s)
        rows.update((prefill, decode) for prefill in beside)
    for prefill in best_prefills:
        beside = _beside(prefills.pool.members[prefill], decodes.pool, decodes.usable_s)
        rows.update((prefill, decode) for decode in beside)
    return rows


def _beside(one: Candidate, others: Pool, costs: Vector) -> list[int]:
    """The cheapest worker of the other side on the same host."""
    rows = others.on_host(one.record.host_id)
    if len(rows) in (0, len(others)):
        return []
    row = int(rows[costs[rows].argmin()])
    return [row] if costs[row] < np.inf else []


def _least(costs: Vector) -> list[int]:
    rows: NDArray[np.int64] = np.argpartition(costs, BEST)[:BEST] if len(costs) > 2 * BEST else np.arange(len(costs))
    return [int(row) for row in rows if costs[row] < np.inf]


def _pair(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts, prefill: int, decode: int, the_way: Way) -> Pair:
    one = decodes.pool.members[decode]
    known = 0 if decodes.known is None else int(decodes.known[decode])
    prefill_s = float(prefills.compute_s[prefill])
    factor = float(decodes.pool.handoff_factor[decode])
    moved_s = exposed_s(one, the_way, ask.prompt_tokens - 1 - known, prefill_s, factor)
    arrives_s = float(prefills.queue_s[prefill]) + prefill_s + moved_s
    # Both sides count the whole of their waits: what of decode's is over by then does not count.
    covered_s = min(arrives_s, float(decodes.slot_s[decode]))
    ordered_s = float(prefills.usable_s[prefill] + decodes.usable_s[decode]) + moved_s - covered_s
    return Pair(prefill, decode, moved_s, ordered_s)
