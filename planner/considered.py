"""What else could have been chosen: the counts next to the ones wanted, what is predicted of them, and why not they.

For people who ask for a reason. It costs as much as deciding does, so that simulations go without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from planner.capacity import NEVER_S
from planner.choose import PoolAsk
from planner.pool_model import Prediction
from planner.scaling import Considered, Counts

CHOSEN = "chosen"
_STEPS = ((-1, 0), (0, -1), (-1, 1), (0, 0), (1, -1), (0, 1), (1, 0))


def considered_of(asks: Iterable[PoolAsk], targets: Mapping[str, Counts], gpu_budget: int) -> tuple[Considered, ...]:
    """The choices around each model's target, the cheapest first."""
    asked = list(asks)
    used = sum(ask.gpus(targets[ask.model]) for ask in asked)
    return tuple(
        one
        for ask in asked
        for one in _of_model(ask, targets[ask.model], gpu_budget - used + ask.gpus(targets[ask.model]))
    )


def _of_model(ask: PoolAsk, target: Counts, most_gpus: int) -> Iterator[Considered]:
    around = sorted(set(_around(ask, target)), key=lambda counts: (ask.gpus(counts), counts))
    for counts in around:
        predicted = ask.pool.predicted(counts)
        never = predicted.ttft_s >= NEVER_S
        verdict = CHOSEN if counts == target else _verdict(ask, predicted, target, most_gpus)
        ttft_s = math.inf if never else predicted.ttft_s
        yield Considered(ask.model, counts, ask.gpus(counts), ttft_s, predicted.itl_s, verdict)


def _around(ask: PoolAsk, target: Counts) -> Iterator[Counts]:
    floor, ceiling = ask.floor, ask.ceiling
    for prefill, decode in _STEPS:
        counts = Counts(target.prefill + prefill, target.decode + decode)
        within = floor.prefill <= counts.prefill <= ceiling.prefill and floor.decode <= counts.decode <= ceiling.decode
        if counts == target or (within and counts.decode > 0 and (counts.prefill > 0 or ask.bounds.allow_aggregated)):
            yield counts
    if ask.bounds.allow_aggregated and target.prefill:
        yield Counts(0, min(target.total, ceiling.decode))


def _verdict(ask: PoolAsk, predicted: Prediction, target: Counts, most_gpus: int) -> str:
    """Why not these."""
    counts, pool = predicted.counts, ask.pool
    gpus, target_gpus = ask.gpus(counts), ask.gpus(target)
    if gpus > most_gpus:
        return f"{_gpus(gpus - most_gpus)} beyond the budget"
    if not pool.asked:
        return "nothing comes that needs them" if gpus > target_gpus else "not taken away yet"
    in_time = pool.prefill_meets(counts.prefill) if counts.prefill else pool.aggregated_meets(counts.decode)
    if predicted.ttft_s >= NEVER_S:
        return "ever more requests would wait"
    if not in_time:
        return f"{predicted.ttft_share:.1%} of first tokens in time"
    if counts.prefill and not pool.decode_meets(counts.decode):
        return f"{predicted.itl_share:.1%} of answers in time"
    if gpus > target_gpus:
        return f"would do, and takes {_gpus(gpus - target_gpus)} more"
    return "would do as well" if gpus == target_gpus else "would do now, with too little to spare"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
