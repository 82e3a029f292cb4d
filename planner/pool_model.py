"""One model's pool under all its classes: what a pair of counts would give, and the least that meets every objective.

Classes are served in the order of their TTFT limits: a class waits behind what goes before it, not behind what comes
after. Decode batches hold all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.capacity import NEVER_S, Corrections, DecodeBatch, Pair, PrefillQueue
from planner.demand import Demand, together
from planner.objectives import Objective
from planner.scaling import Counts

ATTAINABLE = 0.995
"""Where long prompts miss the TTFT limit on any number of workers, the goal is this share of what can be had."""
KV_SHARE = 0.99
FLIP_KV_SHARE = 0.999
"""Where the budget is used up: what finds no block is computed again among the answers, which makes all of them longer.
That does not end by itself, and no new worker comes to help."""
OVERFLOWING = 0.1
"""Of what would be in time, what is left where the blocks do not suffice."""
MOST_USE = 0.92
"""Of prefill's time: closer to its end every formula for queues says less than the next burst does."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One class: what comes, and what it shall get."""

    demand: Demand
    objective: Objective


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected of some counts.

    Attributes:
        ttft_s, itl_s: at the first class' percentile; `NEVER_S` where the queue only grows.
        ttft_share, itl_share: the least share of any class within its limit.
        goodput: requests per second within both limits.
        prefill_use, decode_use: share of the workers that prompts keep busy; of the batch places that are taken.
    """

    counts: Counts
    ttft_s: float
    itl_s: float
    ttft_share: float
    itl_share: float
    goodput: float
    prefill_use: float
    decode_use: float


class PoolModel:
    """Everything that does not depend on counts, computed once.

    Args:
        clearing: prefill workers that are busy with what has waited too long, for as long as it is there.
    """

    def __init__(
        self, pair: Pair, asked: Sequence[Asked], corrections: Corrections | None = None, *, clearing: float = 0.0
    ) -> None:
        self._clearing = clearing
        self.pair = pair
        self.asked = sorted(
            (one for one in asked if one.demand.requests_per_s > 0.0), key=lambda one: one.objective.ttft_s
        )
        self._corrections = corrections or Corrections()
        self._total = together([one.demand for one in self.asked])
        self._queues: list[PrefillQueue] = []
        self._batch: DecodeBatch | None = None
        self._fitting: list[float] = []
        if self.asked:
            self._lay_out()

    def _lay_out(self) -> None:
        pair, corrections = self.pair, self._corrections
        alone = PrefillQueue(self._total, pair.prefill, correction=corrections.prefill)
        profile = pair.prefill.profile
        new_tokens = self._total.input_tokens * (1.0 - self._total.hit_rate)
        per_token = profile.block_bytes / profile.block_tokens
        travel_s = pair.prefill.transfer_s(min(new_tokens, profile.step_tokens) * per_token)
        held_s = alone.mean_s + travel_s
        self._batch = batch = DecodeBatch(self._total, pair.decode, correction=corrections.decode, held_s=held_s)
        for place, one in enumerate(self.asked):
            demand = together([each.demand for each in self.asked[: place + 1]])
            step_s = min(one.objective.itl_s, batch.step_s(batch.most_running))
            fixed_s = profile.overhead_s + travel_s + step_s
            self._queues.append(PrefillQueue(demand, pair.prefill, correction=corrections.prefill, fixed_s=fixed_s))
            # A limit that one sequence alone breaks cannot be met: then as few as possible run together.
            self._fitting.append(batch.fitting(max(one.objective.itl_s, 1.2 * batch.step_s(1.0))))

    # -- disaggregated ------------------------------------------------------------------------------------

    def prefill_meets(self, workers: int) -> bool:
        """Whether every class' first tokens come in time, as far as any number of workers can have them."""
        for queue, one in zip(self._queues, self.asked, strict=True):
            objective = one.objective
            goal = min(objective.percentile / 100.0, ATTAINABLE * queue.most(objective.ttft_s))
            if (
                workers * MOST_USE <= queue.offered
                or self._cleared(workers) < 1.0
                or queue.within(workers, objective.ttft_s) < goal
            ):
                return False
        return True

    def _cleared(self, workers: int) -> float:
        """Of what comes and what waits, the share that these can do."""
        whole = self._queues[-1].offered + self._clearing
        return min(1.0, workers / whole) if whole > 0.0 else 1.0

    def decode_meets(self, workers: int) -> bool:
        """Whether every class' tokens come in time and no request waits for blocks."""
        batch = self._batch
        if batch is None:
            return True
        fed = self._fed(math.inf, batch)
        if fed.running(workers) is None or fed.within(workers, batch.most_running) < KV_SHARE:
            return False
        return all(
            batch.within(workers, fitting) >= one.objective.percentile / 100.0
            for fitting, one in zip(self._fitting, self.asked, strict=True)
        )

    def needed(self, floor: Counts, ceiling: Counts) -> Counts:
        """The fewest workers of each role that meet every objective; the ceiling where not even these do."""
        return Counts(
            least(self.prefill_meets, floor.prefill, ceiling.prefill),
            least(self.decode_meets, floor.decode, ceiling.decode),
        )

    def predicted(self, counts: Counts) -> Prediction:
        """What these counts would give."""
        if not self.asked:
            return Prediction(counts, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
        if counts.prefill == 0:
            return self._aggregated(counts)
        batch = self._batch
        assert batch is not None, "laid out with the first class"
        if counts.decode == 0:
            return Prediction(counts, NEVER_S, NEVER_S, 0.0, 0.0, 0.0, 1.0, 1.0)
        first = self.asked[0].objective
        running = batch.running(counts.decode)
        fits = batch.within(counts.decode, batch.most_running) * self._cleared(counts.prefill)
        ttft = [
            fits * queue.within(counts.prefill, one.objective.ttft_s)
            for queue, one in zip(self._queues, self.asked, strict=True)
        ]
        itl = [batch.within(counts.decode, fitting) for fitting in self._fitting]
        return Prediction(
            counts,
            self._queues[0].percentile_s(counts.prefill, first.percentile) if running is not None else NEVER_S,
            batch.percentile_s(counts.decode, first.percentile),
            min(ttft),
            min(itl),
            self._goodput(ttft, itl),
            min(1.0, self._queues[-1].offered / counts.prefill),
            1.0 if running is None else running / batch.most_running,
        )

    def goodput(self, counts: Counts) -> float:
        """Requests per second within both limits: `predicted`, without what only people ask for."""
        if not self.asked:
            return 0.0
        if counts.prefill == 0:
            return self._aggregated(counts).goodput
        batch = self._batch
        if batch is None or counts.decode == 0:
            return 0.0
        batch = self._fed(counts.prefill, batch)
        fits = batch.fits(counts.decode)
        done = self._cleared(counts.prefill) * (fits if fits >= FLIP_KV_SHARE else OVERFLOWING * fits)
        near = counts.prefill * MOST_USE <= self._queues[-1].offered
        return self._goodput(
            [
                done * (q.lasting if near else q.within)(counts.prefill, a.objective.ttft_s)
                for q, a in zip(self._queues, self.asked, strict=True)
            ],
            [batch.within(counts.decode, fitting) for fitting in self._fitting],
        )

    def _fed(self, workers: float, batch: DecodeBatch) -> DecodeBatch:
        """Decode under what these prefill workers send: not more than they compute, and what has waited, too."""
        queue = self._queues[-1]
        use = min(workers, queue.offered + self._clearing) / queue.offered if queue.offered > 0.0 else 1.0
        return batch if use == 1.0 else batch.under(use)

    def _goodput(self, ttft: list[float], itl: list[float]) -> float:
        return sum(
            one.demand.requests_per_s * first * then for one, first, then in zip(self.asked, ttft, itl, strict=True)
        )

    # -- aggregated ---------------------------------------------------------------------------------------

    def aggregated_meets(self, workers: int) -> bool:
        """Whether so many workers that do both would meet every objective."""
        one = self._aggregated(Counts(0, workers))
        percent = max((asked.objective.percentile for asked in self.asked), default=0.0)
        goal = min(percent / 100.0, ATTAINABLE * min((self._most(asked) for asked in self.asked), default=1.0))
        return one.ttft_s < NEVER_S and one.ttft_share >= goal and one.itl_share >= percent / 100.0

    def _most(self, asked: Asked) -> float:
        return self._queues[self.asked.index(asked)].most(asked.objective.ttft_s)

    def _aggregated(self, counts: Counts) -> Prediction:
        """Prompts are computed in chunks beside the decode batch: each makes the other slower."""
        workers, batch = counts.decode, self._batch
        if not self.asked:
            return Prediction(counts, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
        if workers == 0 or batch is None:
            return Prediction(counts, NEVER_S, NEVER_S, 0.0, 0.0, 0.0, 1.0, 1.0)
        pair, total, scale = self.pair, self._total, self._corrections.prefill
        profile = pair.decode.profile
        new_tokens = total.input_tokens * (1.0 - total.hit_rate)
        chunk_tokens = max(1.0, min(new_tokens, profile.step_tokens))
        chunk_s = scale * pair.decode.chunk_s(chunk_tokens, total.input_tokens / 2.0)
        work_s = PrefillQueue(total, pair.decode, correction=scale).mean_s
        come = total.requests_per_s / workers

        def itl_at(running: float) -> float:
            step_s = batch.step_s(running)
            share = min(1.0, come * work_s * (chunk_s + step_s) / chunk_s)
            return 1.0 / (share / (chunk_s + step_s) + (1.0 - share) / step_s)

        low, high = 0.0, batch.most_running
        for _ in range(18):
            middle = (low + high) / 2.0
            if come * total.output_tokens * itl_at(middle) >= middle:
                low = middle
            else:
                high = middle
        running, full = high, high >= batch.most_running * 0.999
        stretch = (chunk_s + batch.step_s(running)) / chunk_s
        deviation = (running / workers) ** 0.5 * (0.5 + total.burstiness / 2.0) + 0.5
        ttft, itl = [], []
        queue: PrefillQueue | None = None
        for place, one in enumerate(self.asked):
            demand = together([each.demand for each in self.asked[: place + 1]])
            limits = one.objective
            fixed_s = profile.overhead_s + batch.step_s(running)
            each_queue = PrefillQueue(demand, pair.decode, correction=scale, fixed_s=fixed_s, stretch=stretch)
            queue = queue or each_queue
            ttft.append(0.02 if full else each_queue.within(workers, limits.ttft_s))
            fast = itl_at(min(running + 2.3 * deviation, batch.most_running)) <= limits.itl_s
            slow = itl_at(running) > limits.itl_s
            itl.append(0.05 if slow or full else limits.percentile / 100.0 if fast else 0.5)
        assert queue is not None, "there is a class"
        first = self.asked[0].objective
        return Prediction(
            counts,
            NEVER_S if full else queue.percentile_s(workers, first.percentile),
            itl_at(min(running + 2.3 * deviation, batch.most_running)),
            min(ttft),
            min(itl),
            self._goodput(ttft, itl),
            min(1.0, queue.offered / workers),
            running / batch.most_running,
        )


def least(meets: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number for which it holds, and for all above; `high` where it never does."""
    if high <= low or meets(low):
        return low
    step = 1
    while low + step < high and not meets(low + step):
        low, step = low + step, step * 2
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle
    return high
