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

BEST = 3
"""Workers of each side that are looked at together."""


@dataclass(slots=True)
class Pair:
    """One choice of two workers. `ordered_s` is its cost with this frontend's order among equals."""

    prefill: int
    decode: int
    moved_s: float
    ordered_s: float


def best_pairs(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts) -> list[Pair]:
    """The best pairs that can exchange blocks, the best first; empty when there is no such pair.

    A pair that cannot be better than the best one so far, whatever its transfer costs, is not looked at.
    """
    senders = {row: _Sender.at(row, prefills) for row in _least(prefills.usable_s)}
    receivers = {row: _Receiver.at(row, decodes) for row in _least(decodes.usable_s)}
    pairs, least_s = list[Pair](), np.inf
    for sender, receiver in _to_look_at(senders, receivers, prefills, decodes):
        if sender.usable_s + receiver.usable_s - receiver.slot_s > least_s:
            continue
        the_way = way(receiver.one, sender.one)
        if the_way is not None:
            pair = _pair(ask, sender, receiver, the_way)
            least_s = min(least_s, pair.ordered_s)
            pairs.append(pair)
    if not pairs:
        found = next(connected(prefills.pool, prefills.usable_s, decodes.pool, decodes.usable_s), None)
        if found is not None:
            prefill, decode, the_way = found
            pairs = [_pair(ask, _Sender.at(prefill, prefills), _Receiver.at(decode, decodes), the_way)]
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
        kind = one.host_id, one.transports
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


@dataclass(slots=True)
class _Sender:
    """One prefill worker's part of its pairs."""

    one: Candidate
    row: int
    usable_s: float
    queue_s: float
    compute_s: float

    @classmethod
    def at(cls, row: int, costs: PrefillCosts) -> _Sender:
        own = float(costs.usable_s[row]), float(costs.queue_s[row]), float(costs.compute_s[row])
        return cls(costs.pool.members[row], row, *own)


@dataclass(slots=True)
class _Receiver:
    """One decode worker's part of its pairs."""

    one: Candidate
    row: int
    usable_s: float
    slot_s: float
    known: int
    factor: float

    @classmethod
    def at(cls, row: int, costs: DecodeCosts) -> _Receiver:
        known = 0 if costs.known is None else int(costs.known[row])
        own = float(costs.usable_s[row]), float(costs.slot_s[row]), known
        return cls(costs.pool.members[row], row, *own, float(costs.pool.handoff_factor[row]))


def _to_look_at(
    senders: dict[int, _Sender], receivers: dict[int, _Receiver], prefills: PrefillCosts, decodes: DecodeCosts
) -> Iterator[tuple[_Sender, _Receiver]]:
    best_senders = sorted(senders.values(), key=lambda one: one.usable_s)
    best_receivers = sorted(receivers.values(), key=lambda one: one.usable_s)
    for receiver in best_receivers:
        row = _beside(receiver.one, prefills.pool, prefills.usable_s)
        if row is not None and row not in senders:
            yield _Sender.at(row, prefills), receiver
        for sender in best_senders:
            yield sender, receiver
    for sender in best_senders[:1]:
        row = _beside(sender.one, decodes.pool, decodes.usable_s)
        if row is not None and row not in receivers:
            yield sender, _Receiver.at(row, decodes)


def _beside(one: Candidate, others: Pool, costs: Vector) -> int | None:
    """The cheapest worker of the other side on the same host."""
    rows = others.on_host(one.host_id)
    if len(rows) in (0, len(others)):
        return None
    row = int(rows[costs[rows].argmin()])
    return row if costs[row] < np.inf else None


def _least(costs: Vector) -> list[int]:
    rows: NDArray[np.int64] = np.argpartition(costs, BEST)[:BEST] if len(costs) > 2 * BEST else np.arange(len(costs))
    return [int(row) for row in rows if costs[row] < np.inf]


def _pair(ask: Ask, sender: _Sender, receiver: _Receiver, the_way: Way) -> Pair:
    moved_tokens = ask.prompt_tokens - 1 - receiver.known
    moved_s = exposed_s(receiver.one, the_way, moved_tokens, sender.compute_s, receiver.factor)
    arrives_s = sender.queue_s + sender.compute_s + moved_s
    # Both sides count the whole of their waits: what of decode's is over by then does not count.
    covered_s = min(arrives_s, receiver.slot_s)
    ordered_s = sender.usable_s + receiver.usable_s + moved_s - covered_s
    return Pair(sender.row, receiver.row, moved_s, ordered_s)
