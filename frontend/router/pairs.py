"""The joint choice: the prefill and the decode worker whose common cost is least.

A pair's cost is the sum of two that are known for each worker alone, and of what depends on both: the transfer, and
the wait for a place on the decode worker as far as the prompt's computation does not cover it. So only the best of
each side need to be looked at together, and the best on one host with each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from frontend.router.ask import Ask
from frontend.router.candidate import Candidate, Way
from frontend.router.cost import DecodeCosts, Pair, PrefillCosts
from frontend.router.pool import Pool
from frontend.router.speeds import Vector
from frontend.router.ways import exposed_s, way

BEST = 3
"""Workers of each side that are looked at together."""

SHOWN = 3
"""Choices that are kept to explain a decision."""

_FEW = 16
_Found = tuple[float, int, int, float]
"""A pair: its cost with this frontend's order among equals, its rows, and what of the transfer is felt."""


def best_pairs(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts) -> list[Pair]:
    """The best few pairs that can exchange blocks, the best first; empty when there is no such pair.

    A pair that cannot be better than the best one so far, whatever its transfer costs, is not looked at.
    """
    senders = [_Sender.at(row, prefills) for row in least(prefills.usable_s)]
    receivers = [_Receiver.at(row, decodes, ask) for row in least(decodes.usable_s)]
    found, least_s = list[_Found](), np.inf
    for receiver, looked_at in _to_look_at(ask, senders, receivers, prefills, decodes):
        one, usable_s, slot_s = receiver.one, receiver.usable_s, receiver.slot_s
        for sender in looked_at:
            if sender.usable_s + usable_s - slot_s <= least_s and (the_way := way(one, sender.one)) is not None:
                pair = _weighed(prefills, sender, receiver, the_way)
                found.append(pair)
                if pair[0] < least_s:
                    least_s = pair[0]
    if not found:
        for prefill, decode, the_way in connected(prefills.pool, prefills.usable_s, decodes.pool, decodes.usable_s):
            sender, receiver = _Sender.at(prefill, prefills), _Receiver.at(decode, decodes, ask)
            found.append(_weighed(prefills, sender, receiver, the_way))
            break
    found.sort()
    return [Pair(prefill, decode, moved_s, cost_s) for cost_s, prefill, decode, moved_s in found[:SHOWN]]


def least(costs: Vector) -> list[int]:
    """Rows of the lowest costs, the lowest first, without those that are infinite."""
    if len(costs) <= 2 * BEST:
        rows = sorted(range(len(costs)), key=costs.item)
        return [row for row in rows if costs[row] < np.inf]
    found, values = list[int](), list[float]()
    for _ in range(BEST):  # three times the lowest: a tenth of the time of a partition
        row = int(costs.argmin())
        value = costs.item(row)
        if value == np.inf:
            break
        found.append(row)
        values.append(value)
        costs[row] = np.inf
    for row, value in zip(found, values, strict=True):
        costs[row] = value
    return found


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


@dataclass(slots=True)
class _Sender:
    """One prefill worker's part of its pairs."""

    one: Candidate
    row: int
    usable_s: float
    compute_s: float

    @classmethod
    def at(cls, row: int, costs: PrefillCosts) -> _Sender:
        return cls(costs.pool.members[row], row, costs.usable_s.item(row), costs.compute_s(row))


@dataclass(slots=True)
class _Receiver:
    """One decode worker's part of its pairs."""

    one: Candidate
    row: int
    usable_s: float
    slot_s: float
    moved_tokens: int
    factor: float

    @classmethod
    def at(cls, row: int, costs: DecodeCosts, ask: Ask) -> _Receiver:
        pool, moved_tokens = costs.pool, ask.prompt_tokens - 1 - costs.rests.known(row)
        usable_s, factor = costs.usable_s.item(row), pool.handoff_factor.item(row)
        return cls(pool.members[row], row, usable_s, costs.slot_s(row), moved_tokens, factor)


def _to_look_at(
    ask: Ask, senders: list[_Sender], receivers: list[_Receiver], prefills: PrefillCosts, decodes: DecodeCosts
) -> Iterator[tuple[_Receiver, list[_Sender]]]:
    """Each receiver with those whose blocks it may receive: the best of all, and the best on its own host."""
    sending, receiving = [one.row for one in senders], [one.row for one in receivers]
    for receiver in receivers:
        row = _beside(receiver.one, prefills.pool, prefills.usable_s)
        yield receiver, senders if row is None or row in sending else [_Sender.at(row, prefills), *senders]
    for sender in senders[:1]:
        row = _beside(sender.one, decodes.pool, decodes.usable_s)
        if row is not None and row not in receiving:
            yield _Receiver.at(row, decodes, ask), [sender]


def _beside(one: Candidate, others: Pool, costs: Vector) -> int | None:
    """The cheapest worker of the other side on the same host."""
    rows = others.on_host(one.host_id)
    if len(rows) in (0, len(others)):
        return None
    row = min(rows, key=costs.item) if len(rows) <= _FEW else rows[int(costs[rows].argmin())]
    return row if costs.item(row) < np.inf else None


def _weighed(prefills: PrefillCosts, sender: _Sender, receiver: _Receiver, the_way: Way) -> _Found:
    moved_s = exposed_s(receiver.one, the_way, receiver.moved_tokens, sender.compute_s, receiver.factor)
    cost_s = sender.usable_s + receiver.usable_s + moved_s
    if receiver.slot_s > 0:
        # Both sides count the whole of their waits: what of decode's is over by then does not count.
        cost_s -= min(prefills.queue_s(sender.row) + sender.compute_s + moved_s, receiver.slot_s)
    return cost_s, sender.row, receiver.row, moved_s
