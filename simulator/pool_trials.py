"""Pools of fixed size under one load: what the simulator shows of each, and which is the smallest that will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from planner.objectives import Objective
from planner.scaling import Counts
from simulator.chosen_load import Load
from simulator.outcome import Latencies
from simulator.run import ModelSetup, Setup, simulate
from simulator.traces import Arrival, assigned
from slipstream.performance import Profile

Kind = Literal["disaggregated", "aggregated"]

MODEL = "recommended"
CLASS = "realtime"
WHOLE_RUN_S = 1e6
"""One row of the series is enough."""
MOST_SPLITS = 5


class Pool(msgspec.Struct, frozen=True):
    """A pool and what the simulator showed of it.

    Attributes:
        gpus: of all its workers.
        ttft_s, itl_s: at the objective's percentile, or the next higher one of 50, 90, 95 and 99.
        ttft_attainment, itl_attainment: of all requests, those that kept one limit; attainment: both.
        goodput_per_gpu: requests per second within both limits, for each GPU.
        margin: how many times this load it bears; 0: not asked for.
    """

    kind: Kind
    profile: str
    tensor_parallel: int
    prefill: int
    decode: int
    gpus: int
    meets: bool
    ttft_s: float
    itl_s: float
    ttft_attainment: float
    itl_attainment: float
    attainment: float
    refused: int
    hit_rate: float
    goodput_per_gpu: float
    margin: float = 0.0

    @property
    def counts(self) -> Counts:
        return Counts(self.prefill, self.decode)

    @property
    def workers(self) -> str:
        """`2P3D`, or `3 aggregated`."""
        return str(self.counts) if self.kind == "disaggregated" else f"{self.decode} aggregated"


@dataclass(slots=True)
class Trials:
    """Pools of one kind of worker under one load, each simulated once.

    Args:
        duration_s: of the load.
        said: told of each pool that was simulated.
    """

    profile: Profile
    load: Load
    duration_s: float
    objective: Objective
    seed: int = 0
    said: Callable[[Pool], None] = lambda pool: None
    count: int = 0
    _known: dict[Counts, Pool] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """Of one worker."""
        return max(1, self.profile.gpus)

    def pool(self, counts: Counts) -> Pool:
        """So many workers."""
        if counts not in self._known:
            self._known[counts] = self._simulated(counts, 1.0)
            self.said(self._known[counts])
        return self._known[counts]

    def bears(self, counts: Counts, factor: float) -> bool:
        """Whether they would do for so many times the load."""
        return self._simulated(counts, factor).meets

    def best(self, kind: Kind) -> Pool | None:
        """Of those that were simulated: the smallest that will do, else the one that came nearest to it."""
        own = [pool for pool in self._known.values() if pool.kind == kind]
        return min(
            own, key=lambda pool: (not pool.meets, pool.gpus if pool.meets else 0, -pool.attainment), default=None
        )

    def split(self, workers: int, prefill: int) -> Pool:
        """So many workers, divided so that the objective is met where that can be; `prefill` is where to begin.

        What misses its limit gets one worker of the other role, until that one misses too.
        """
        prefill = min(max(prefill, 1), workers - 1)
        tried: set[int] = set()
        while len(tried) < MOST_SPLITS and 1 <= prefill < workers and prefill not in tried:
            pool = self.pool(Counts(prefill, workers - prefill))
            if pool.meets:
                return pool
            tried.add(prefill)
            prefill += 1 if pool.ttft_attainment < pool.itl_attainment else -1
        return max((self.pool(Counts(one, workers - one)) for one in tried), key=lambda pool: pool.attainment)

    def _simulated(self, counts: Counts, factor: float) -> Pool:
        self.count += 1
        load = self.load.faster(factor)
        outcome = simulate(
            Setup(
                (ModelSetup(MODEL, self.profile, counts, {CLASS: self.objective}),),
                _in_one_class(load),
                seed=self.seed,
                series_s=WHOLE_RUN_S,
                block_tokens=load.block_tokens,
            )
        )
        seen, wanted, gpus = outcome.all, self.objective.percentile / 100.0, counts.total * self.gpus
        return Pool(
            kind="disaggregated" if counts.prefill else "aggregated",
            profile=self.profile.name,
            tensor_parallel=self.profile.tensor_parallel,
            prefill=counts.prefill,
            decode=counts.decode,
            gpus=gpus,
            meets=seen.ttft_attainment >= wanted and seen.itl_attainment >= wanted,
            ttft_s=at_percentile(seen.ttft, self.objective.percentile),
            itl_s=at_percentile(seen.itl, self.objective.percentile),
            ttft_attainment=seen.ttft_attainment,
            itl_attainment=seen.itl_attainment,
            attainment=seen.attainment,
            refused=seen.refused,
            hit_rate=seen.hit_rate,
            goodput_per_gpu=seen.good / max(self.duration_s / factor, 1e-9) / gpus,
        )


def smallest(will_do: Callable[[int], bool], start: int, least: int, most: int) -> int | None:
    """The smallest number for which it holds, looked for from `start` on; None: not even `most`.

    It is asked as seldom as can be: each answer costs a simulation.
    """
    if most < least:
        return None
    high = low = min(max(start, least), most)
    step = 1
    if will_do(high):
        while low > least:
            low = max(least, high - step)
            if not will_do(low):
                break
            high, step = low, step * 2
        else:
            return high
    else:
        while True:
            if high == most:
                return None
            low, high, step = high, min(most, high + step), step * 2
            if will_do(high):
                break
    while high - low > 1:
        middle = (low + high) // 2
        if will_do(middle):
            high = middle
        else:
            low = middle
    return high


def at_percentile(latencies: Latencies, percent: float) -> float:
    """Of the percentiles that are told, the first that is no lower."""
    told = ((50.0, latencies.p50_s), (90.0, latencies.p90_s), (95.0, latencies.p95_s))
    return next((value for name, value in told if name >= percent), latencies.p99_s)


def _in_one_class(load: Load) -> Iterable[Arrival]:
    return assigned(load.begin(), model=MODEL, service_class=CLASS)
