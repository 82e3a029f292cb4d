"""Which counts: the cheapest that meet the objectives of every model within one budget, else those that lose least.

Models with more weight go first. What is left of the budget serves batch work, and comes back when it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from planner.objectives import Bounds
from planner.pool_model import PoolModel, least
from planner.scaling import Counts

NONE = Counts(0, 0)
AGGREGATED_GAIN = 0.9
"""An aggregated pool is chosen where it costs at most this share of the disaggregated one."""
FLIP_GAIN = 1.1
"""Of a budget that does not suffice: what another split must promise over the one that is there."""

BARRED_GAIN = 2.0
"""The same, of one that was left before because it had too few of a role."""

FULL_GAIN = 1.01
"""The same, of one that is predicted to suffice for a budget that is used up."""


@dataclass(frozen=True, slots=True)
class PoolAsk:
    """One model's wish.

    Attributes:
        floor: least counts: bounds, and what a schedule asks for.
        batch: work without an objective that is there too; None: none.
        now: its workers, which stay as they are where two ways are equally good.
    """

    model: str
    pool: PoolModel
    floor: Counts
    bounds: Bounds
    weight: float = 1.0
    batch: PoolModel | None = None
    now: Counts = NONE

    def gpus(self, counts: Counts) -> int:
        """That so many workers occupy."""
        pair = self.pool.pair
        return counts.prefill * pair.prefill_gpus + counts.decode * pair.decode_gpus

    @property
    def ceiling(self) -> Counts:
        """Most counts."""
        return Counts(
            max(self.floor.prefill, self.bounds.max_prefill),
            max(self.floor.decode, self.bounds.max_decode),
        )


def choose(asks: Sequence[PoolAsk], gpu_budget: int) -> dict[str, Counts]:
    """Counts for each model; together they never occupy more than the budget."""
    ranked = sorted(asks, key=lambda ask: (-ask.weight, ask.model))
    chosen = _floors(ranked, gpu_budget)
    left = gpu_budget - sum(ask.gpus(chosen[ask.model]) for ask in ranked)
    for _, group in groupby(ranked, key=lambda ask: ask.weight):
        equals = list(group)
        wishes = {ask.model: cheapest(ask, gpu_budget) for ask in equals}
        more = {ask.model: max(0, ask.gpus(wishes[ask.model]) - ask.gpus(chosen[ask.model])) for ask in equals}
        short = sum(more.values()) > left
        rest = left
        for ask in equals:
            have = ask.gpus(chosen[ask.model])
            part = more[ask.model]
            if short:
                part = min(rest, math.ceil(left * part / sum(more.values())))
                wish = best_within(ask, have + part)
            else:
                wish = wishes[ask.model]
            if ask.gpus(wish) <= have + rest:
                rest -= ask.gpus(wish) - have
                chosen[ask.model] = wish
        left = rest
    for ask in ranked:
        if ask.batch is not None:
            more_counts = _with_batch(ask, ask.batch, chosen[ask.model], left)
            left -= ask.gpus(more_counts) - ask.gpus(chosen[ask.model])
            chosen[ask.model] = more_counts
    return chosen


def cheapest(ask: PoolAsk, gpu_budget: int) -> Counts:
    """The fewest GPUs that meet the objectives, whatever the budget."""
    pair, floor, ceiling = ask.pool.pair, ask.floor, ask.ceiling
    limit = Counts(
        min(ceiling.prefill, max(floor.prefill, gpu_budget // pair.prefill_gpus)),
        min(ceiling.decode, max(floor.decode, gpu_budget // pair.decode_gpus)),
    )
    apart = ask.pool.needed(floor, limit)
    if not ask.bounds.allow_aggregated or not ask.pool.asked:
        return apart
    both = least(ask.pool.aggregated_meets, max(1, floor.prefill + floor.decode), limit.decode)
    mixed = Counts(0, both)
    if not ask.pool.aggregated_meets(both):
        return apart
    # What runs now keeps its way of working unless the other is clearly cheaper.
    gain = 1.0 / AGGREGATED_GAIN if ask.now.prefill == 0 and ask.now.decode > 0 else AGGREGATED_GAIN
    return mixed if ask.gpus(mixed) <= gain * ask.gpus(apart) else apart


def best_within(ask: PoolAsk, gpus: int) -> Counts:
    """The split of so many GPUs with the highest predicted goodput."""
    pair, floor, ceiling = ask.pool.pair, ask.floor, ask.ceiling
    best, best_goodput, stay = floor, -1.0, -1.0
    for prefill in range(floor.prefill, ceiling.prefill + 1):
        left = gpus - prefill * pair.prefill_gpus
        decode = min(ceiling.decode, left // pair.decode_gpus)
        if left < 0 or decode < floor.decode:
            break
        counts = Counts(prefill, decode)
        if prefill == 0 and not ask.bounds.allow_aggregated:
            continue
        goodput = ask.pool.goodput(counts)
        if counts == ask.now:
            stay = goodput
        if goodput > best_goodput * (1.0 + 1e-9):
            best, best_goodput = counts, goodput
    return ask.now if stay * FLIP_GAIN >= best_goodput else best


def unbarred(ask: PoolAsk, wanted: Counts, least_counts: Counts, gpu_budget: int) -> Counts:
    """What is wanted, unless it takes workers from one role for the other for too little.

    Where the budget is used up, no start makes good what a flip took. What was too few before is hardly enough now.

    Args:
        least_counts: the fewest that may be tried.
    """
    now = ask.now
    exchange = (wanted.prefill - now.prefill) * (wanted.decode - now.decode) < 0
    barred = wanted.prefill < min(now.prefill, least_counts.prefill) or wanted.decode < min(
        now.decode, least_counts.decode
    )
    full = ask.gpus(now) >= gpu_budget
    below = now.prefill < max(1, ask.floor.prefill) or now.decode < max(1, ask.floor.decode)
    if not exchange or not (barred or full) or below or wanted.prefill == 0:
        return wanted
    gain = BARRED_GAIN if barred else FULL_GAIN
    return wanted if ask.pool.goodput(wanted) > gain * ask.pool.goodput(now) else now


def _floors(ranked: Sequence[PoolAsk], gpu_budget: int) -> dict[str, Counts]:
    """Each its floor; the last in rank get less where the budget does not even suffice for these."""
    chosen: dict[str, Counts] = {}
    left = gpu_budget
    for ask in ranked:
        floor = ask.floor
        while ask.gpus(floor) > left and floor.total:
            floor = (
                Counts(floor.prefill - 1, floor.decode)
                if floor.prefill >= floor.decode
                else Counts(floor.prefill, floor.decode - 1)
            )
        chosen[ask.model] = floor
        left -= ask.gpus(floor)
    return chosen


def _with_batch(ask: PoolAsk, batch: PoolModel, counts: Counts, left: int) -> Counts:
    """More workers for batch work, from what nobody with an objective needs."""
    pair, ceiling = ask.pool.pair, ask.ceiling
    wanted = batch.needed(counts, Counts(max(counts.prefill, ceiling.prefill), max(counts.decode, ceiling.decode)))
    if counts.prefill == 0 and counts.decode > 0:
        wanted = Counts(0, wanted.decode)
    while True:
        prefill_short = counts.prefill < wanted.prefill and left >= pair.prefill_gpus
        decode_short = counts.decode < wanted.decode and left >= pair.decode_gpus
        if not prefill_short and not decode_short:
            return counts
        lead = wanted.prefill * counts.decode - wanted.decode * counts.prefill
        if prefill_short and (lead >= 0 or not decode_short):
            counts = Counts(counts.prefill + 1, counts.decode)
            left -= pair.prefill_gpus
        else:
            counts = Counts(counts.prefill, counts.decode + 1)
            left -= pair.decode_gpus
