"""What so many workers would do with such requests: TTFT and ITL, and the share of requests that would keep to a limit.

The measured profile that router and simulated engine predict with, put into closed forms of queueing theory.

- Prefill is a queue with several servers. How long one waits follows Allen and Cunneen: Erlang's chance to wait at all,
  and an exponential tail whose mean grows with the variation of arrivals and of prompts' compute times
  (W. Whitt, Approximations for the GI/G/m queue, Production and Operations Management 2, 1993).
- Decode is a batch: as many sequences run as come within the time that one takes (Little), which itself depends on how
  many run. Around that mean their number varies as in a queue without waiting, by the bursts of arrivals.
- What decode holds must fit its KV blocks. Where it does not, requests wait for blocks, before their first token.

All is pure and cheap: what does not depend on the number of workers is computed once for a demand.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from copy import copy
from dataclasses import dataclass
from statistics import NormalDist

from planner.demand import Demand
from slipstream.performance import Predictor, Profile

NORMAL = NormalDist()
LENGTH_WEIGHTS = (0.10, 0.20, 0.20, 0.20, 0.15, 0.10, 0.03, 0.015, 0.005)
_EDGES = tuple(sum(LENGTH_WEIGHTS[:place]) for place in range(len(LENGTH_WEIGHTS)))
LENGTH_QUANTILES = tuple(
    NORMAL.inv_cdf(edge + weight / 2.0) for edge, weight in zip(_EDGES, LENGTH_WEIGHTS, strict=True)
)
"""Lengths are taken for lognormal, and read at these points; the tail finely, as it decides a high percentile."""
KV_FILL = 0.95
"""Of the KV blocks, what requests can hold before they wait: the rest is rounding and answers that grow."""
NEVER_S = 86400.0
OVERLOAD_S = 120.0
"""Beyond saturation a queue grows steadily: how long such a load is taken to last."""


@dataclass(frozen=True, slots=True)
class Corrections:
    """What was seen over what the profile says, by time: above 1 the worker is slower than its profile."""

    prefill: float = 1.0
    decode: float = 1.0


@dataclass(frozen=True, slots=True)
class Pair:
    """The two kinds of workers of a model, as predictors of their profiles."""

    prefill: Predictor
    decode: Predictor

    @classmethod
    def of(cls, prefill: Profile, decode: Profile | None = None) -> Pair:
        """One profile where both roles' workers are alike."""
        first = Predictor(prefill)
        return cls(first, Predictor(decode) if decode is not None else first)

    @property
    def profiles(self) -> tuple[Profile, Profile]:
        """Of prefill and of decode."""
        return self.prefill.profile, self.decode.profile

    @property
    def prefill_gpus(self) -> int:
        return max(1, self.prefill.profile.gpus)

    @property
    def decode_gpus(self) -> int:
        return max(1, self.decode.profile.gpus)


def lengths(demand: Demand, most: float) -> list[float]:
    """Prompt lengths at `LENGTH_QUANTILES`, with the demand's mean."""
    spread = math.sqrt(math.log1p(demand.input_variation**2))
    raw = [math.exp(spread * place) for place in LENGTH_QUANTILES]
    mean = sum(weight * one for weight, one in zip(LENGTH_WEIGHTS, raw, strict=True))
    return [min(one * demand.input_tokens / mean, most) for one in raw]


class PrefillQueue:
    """The prefill workers' queue under one demand.

    Attributes:
        offered: workers that it keeps busy, on average.
        mean_s: compute time of one prompt, alone; fixed_s: what a first token takes besides computing and waiting.
    """

    __slots__ = ("_spread", "_times", "fixed_s", "mean_s", "offered")

    def __init__(
        self,
        demand: Demand,
        predictor: Predictor,
        *,
        correction: float = 1.0,
        fixed_s: float = 0.0,
        stretch: float = 1.0,
    ) -> None:
        self.fixed_s = fixed_s
        hit = demand.hit_rate
        scale = correction * stretch
        self._times = [
            scale * predictor.prefill_s(length * (1.0 - hit), length * hit)
            for length in lengths(demand, predictor.profile.max_model_len)
        ]
        weighed = list(zip(LENGTH_WEIGHTS, self._times, strict=True))
        self.mean_s = sum(weight * one for weight, one in weighed)
        square = sum(weight * one * one for weight, one in weighed)
        variation = square / (self.mean_s * self.mean_s) - 1.0 if self.mean_s > 0.0 else 0.0
        self._spread = (demand.burstiness + max(0.0, variation)) / 2.0
        self.offered = demand.requests_per_s * self.mean_s

    def waits(self, workers: int) -> tuple[float, float]:
        """The chance to wait, and how long then, on average; `NEVER_S` where the queue only grows."""
        if workers <= self.offered:
            return 1.0, NEVER_S
        return _erlang_c(workers, self.offered), self.mean_s * self._spread / (workers - self.offered)

    def within(self, workers: int, limit_s: float) -> float:
        """Share of requests whose first token comes in time. Where the queue only grows, next to none, by how much."""
        if workers <= self.offered:
            return 0.05 * workers / self.offered
        chance, mean_s = self.waits(workers)
        share = 0.0
        for weight, compute_s in zip(LENGTH_WEIGHTS, self._times, strict=True):
            left_s = limit_s - self.fixed_s - compute_s
            if left_s >= 0.0:
                share += weight * (1.0 - chance * math.exp(-left_s / mean_s)) if mean_s > 0.0 else weight
        return share

    def lasting(self, workers: int, limit_s: float) -> float:
        """As `within`, of a load near or beyond saturation that lasts `OVERLOAD_S`: its queue grows from nothing."""
        growth = max(0.0, self.offered / workers - 1.0)
        left_s = max(0.0, limit_s - self.fixed_s - self.mean_s)
        early = 1.0 if growth * OVERLOAD_S <= left_s else left_s / (growth * OVERLOAD_S)
        return max(self.within(workers, limit_s), self.most(limit_s) * early)

    def most(self, limit_s: float) -> float:
        """The share that any number of workers reaches: a long prompt may take longer alone."""
        return sum(
            weight
            for weight, compute_s in zip(LENGTH_WEIGHTS, self._times, strict=True)
            if compute_s + self.fixed_s <= limit_s
        )

    def percentile_s(self, workers: int, percent: float) -> float:
        """The time within which so many percent of the first tokens come."""
        if workers <= self.offered:
            return NEVER_S
        low, high = 0.0, self.fixed_s + self._times[-1] + 40.0 * self.waits(workers)[1]
        for _ in range(20):
            middle = (low + high) / 2.0
            if self.within(workers, middle) * 100.0 >= percent:
                high = middle
            else:
                low = middle
        return high


class DecodeBatch:
    """The decode workers' batches under one demand.

    Attributes:
        context: mean tokens of a running sequence.
        most_running: sequences that fit on one worker.
        held_s: how long a sequence holds its blocks before it generates.
    """

    __slots__ = ("_batches", "_demand", "_found", "_steps", "context", "held_s", "most_running")

    def __init__(self, demand: Demand, predictor: Predictor, *, correction: float = 1.0, held_s: float = 0.0) -> None:
        profile = predictor.profile
        self._demand = demand
        self._found: dict[int, float | None] = {}
        self.context = demand.input_tokens + demand.output_tokens / 2.0
        self._batches = predictor.batches
        self._steps = [correction * predictor.decode_s(batch, self.context) for batch in predictor.batches]
        self.held_s = held_s
        fits = KV_FILL * profile.blocks * profile.block_tokens / max(1.0, self.context)
        self.most_running = max(1.0, min(float(profile.max_running), fits))

    def under(self, factor: float) -> DecodeBatch:
        """The same requests, so many times as often."""
        other = copy(self)
        other._demand = self._demand.scaled(factor)
        other._found = {}
        return other

    def step_s(self, running: float) -> float:
        """One step of so many on one worker."""
        batches, steps = self._batches, self._steps
        if len(batches) == 1:
            return steps[0]
        batch = max(1.0, running)
        place = min(max(bisect_right(batches, batch) - 1, 0), len(batches) - 2)
        share = (batch - batches[place]) / (batches[place + 1] - batches[place])
        return steps[place] + (steps[place + 1] - steps[place]) * share

    def running(self, workers: int) -> float | None:
        """Sequences on one worker, on average, those that wait for their blocks' content too; None: ever more."""
        if workers not in self._found:
            self._found[workers] = self._running(workers)
        return self._found[workers]

    def _running(self, workers: int) -> float | None:
        come = self._demand.requests_per_s / workers
        tokens = self._demand.output_tokens

        def excess(running: float) -> float:
            return come * (tokens * self.step_s(running) + self.held_s) - running

        high = self.most_running
        if excess(high) >= 0.0:
            return None
        low = 0.0
        for _ in range(18):
            middle = (low + high) / 2.0
            if excess(middle) >= 0.0:
                low = middle
            else:
                high = middle
        return high

    def fitting(self, limit_s: float) -> float:
        """Most sequences on one worker whose step takes no longer; 0 where one alone takes longer."""
        low, high = 1.0, self.most_running
        if self.step_s(low) > limit_s:
            return 0.0
        if self.step_s(high) <= limit_s:
            return high
        for _ in range(18):
            middle = (low + high) / 2.0
            if self.step_s(middle) <= limit_s:
                low = middle
            else:
                high = middle
        return low

    def within(self, workers: int, fitting: float) -> float:
        """Share of answers during which no more than `fitting` run on a worker. Where ever more run, next to none."""
        running = self.running(workers)
        if running is None:
            return 0.05 * workers * self._throughput() / max(self._demand.requests_per_s, 1e-9)
        if running <= 0.0:
            return 1.0 if fitting > 0.0 else 0.0
        return NORMAL.cdf((fitting - running) / self._deviation(running, workers))

    def fits(self, workers: int) -> float:
        """The chance that what runs has room: long prompts hold more blocks than their number tells."""
        running = self.running(workers)
        if running is None:
            return self.within(workers, self.most_running)
        if running <= 0.0:
            return 1.0
        demand = self._demand
        inputs, outputs = demand.input_tokens / self.context, demand.output_tokens / self.context
        spread = math.sqrt(1.0 + (demand.input_variation * inputs) ** 2 + 0.5 * outputs**2)
        return NORMAL.cdf((self.most_running - running) / (spread * self._deviation(running, workers)))

    def percentile_s(self, workers: int, percent: float) -> float:
        """The time between tokens that so many percent of the answers keep."""
        running = self.running(workers)
        if running is None:
            return self.step_s(self.most_running)
        level = NORMAL.inv_cdf(min(max(percent / 100.0, 0.001), 0.9999))
        most = running + level * self._deviation(running, workers)
        return self.step_s(min(max(most, 1.0), self.most_running))

    def _deviation(self, running: float, workers: int) -> float:
        """Of one worker's batch: the pool's number varies with arrivals' bursts, and is spread evenly but for one."""
        whole = max(running * workers, 1.0)
        bursts = (1.0 + self._demand.burstiness) / 2.0
        return math.sqrt(bursts * whole) / workers + 0.5 * min(1.0, running)

    def _throughput(self) -> float:
        """Requests per second that a full worker answers."""
        return self.most_running / (self._demand.output_tokens * self.step_s(self.most_running) + self.held_s)


def _erlang_c(workers: int, offered: float) -> float:
    """The chance that all are busy (Erlang C), by the recursion of Erlang B."""
    if offered <= 0.0:
        return 0.0
    blocked = 1.0
    for count in range(1, workers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    use = offered / workers
    return blocked / (1.0 - use * (1.0 - blocked))
