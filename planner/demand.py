"""What a pool of workers is to serve, and how it is learned from what frontends report.

`Demand` is the input of the performance model: a rate, the lengths of prompts and answers, how much of the prompts is
in caches, and how much arrivals bunch. `DemandSeen` estimates one for each priority class of a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from planner.forecast import Forecaster
from planner.observation import Traffic

SHAPE_WINDOW_S = 300.0
"""Lengths and hit rates change slowly, and are estimated over so long."""
BUNCH_INTERVALS = 4
BUNCH_WINDOW_S = 1200.0
BUNCH_PRIOR = 6.0
FIRST_INPUT_TOKENS = 1000.0
FIRST_WEIGHT = 10.0
MAX_HIT_RATE = 0.95
FIRST_OUTPUT_TOKENS = 200.0
FIRST_OUTPUT_WEIGHT = 2.0
FIRST_VARIATION = 1.0
MAX_VARIATION = 4.0
MAX_BURSTINESS = 12.0


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests of one kind.

    Attributes:
        input_variation: standard deviation of the prompts' lengths as a share of their mean.
        hit_rate: share of the prompt tokens that no worker has to compute.
        burstiness: variance of the arrivals' number over that of Poisson arrivals.
    """

    requests_per_s: float
    input_tokens: float
    output_tokens: float
    input_variation: float = FIRST_VARIATION
    hit_rate: float = 0.0
    burstiness: float = 1.0

    def scaled(self, factor: float) -> Demand:
        """The same requests, so many times as often."""
        return replace(self, requests_per_s=self.requests_per_s * factor)

    def at(self, requests_per_s: float) -> Demand:
        """The same requests at another rate."""
        return replace(self, requests_per_s=requests_per_s)


def together(demands: list[Demand]) -> Demand:
    """Several kinds in one stream."""
    rate = sum(one.requests_per_s for one in demands)
    if rate <= 0.0:
        return demands[0] if demands else Demand(0.0, 1.0, 1.0)
    shares = [one.requests_per_s / rate for one in demands]
    pairs = list(zip(shares, demands, strict=True))
    tokens = sum(share * one.input_tokens for share, one in pairs)
    square = sum(share * one.input_tokens**2 * (1.0 + one.input_variation**2) for share, one in pairs)
    hits = sum(share * one.input_tokens * one.hit_rate for share, one in pairs)
    return Demand(
        rate,
        tokens,
        sum(share * one.output_tokens for share, one in pairs),
        math.sqrt(max(0.0, square / (tokens * tokens) - 1.0)) if tokens else 0.0,
        hits / tokens if tokens else 0.0,
        sum(share * one.burstiness for share, one in pairs),
    )


class DemandSeen:
    """One priority class of one model: its rate's forecast, and the shape of its requests.

    Attributes:
        requests: the forecaster of their number per second.
        idle_s: since the last one came.
    """

    __slots__ = ("_block", "_blocks", "_bunched", "_bunched_blocks", "_sums", "idle_s", "requests")

    def __init__(self, horizon_s: float = 120.0) -> None:
        self.requests = Forecaster(horizon_s)
        self.idle_s = 0.0
        self._sums = _Sums()
        self._block = [0.0, 0.0]
        self._blocks: list[float] = []
        self._bunched = self._bunched_blocks = 0.0

    def add(self, traffic: Traffic | None, interval_s: float, unix_s: float) -> None:
        """What one interval brought; None where nothing happened in it."""
        traffic = traffic or Traffic()
        # What was refused came too: a planner that forgets it never makes room for it.
        came = traffic.arrivals + traffic.refused
        self.idle_s = 0.0 if came or traffic.queued else self.idle_s + interval_s
        self.requests.add(came / interval_s, interval_s, unix_s)
        self._sums.add(traffic, interval_s)
        self._count(came, interval_s)

    def demand(self, requests_per_s: float) -> Demand:
        """Requests as they have been, at that rate."""
        sums = self._sums
        return Demand(
            requests_per_s,
            sums.input_tokens,
            sums.output_tokens,
            sums.input_variation,
            sums.hit_rate,
            self.burstiness,
        )

    @property
    def burstiness(self) -> float:
        """Variance of arrivals in a block of intervals over their mean; what is not known yet counts as Poisson's."""
        known = (self._bunched + BUNCH_PRIOR) / (self._bunched_blocks + BUNCH_PRIOR)
        return min(max(known, 1.0), MAX_BURSTINESS)

    def _count(self, came: int, interval_s: float) -> None:
        self._block[0] += came
        self._block[1] += 1
        if self._block[1] < BUNCH_INTERVALS:
            return
        self._blocks = [*self._blocks[-2:], self._block[0]]
        self._block = [0.0, 0.0]
        mean = sum(self._blocks) / 3.0
        if len(self._blocks) < 3 or mean <= 0.0:
            return
        # Second differences: neither a level nor a ramp enters. Their variance is six times one block's.
        first, second, third = self._blocks
        keep = math.exp(-BUNCH_INTERVALS * interval_s / BUNCH_WINDOW_S)
        self._bunched = self._bunched * keep + (first - 2.0 * second + third) ** 2 / 6.0 / mean
        self._bunched_blocks = self._bunched_blocks * keep + 1.0


class _Sums:
    """Sums that forget, and the means that they make."""

    __slots__ = ("_arrivals", "_cached", "_computed", "_finished", "_inputs", "_outputs", "_seen", "_spread")

    def __init__(self) -> None:
        self._arrivals = self._inputs = self._finished = self._outputs = 0.0
        self._computed = self._cached = self._spread = self._seen = 0.0

    def add(self, traffic: Traffic, interval_s: float) -> None:
        keep = math.exp(-interval_s / SHAPE_WINDOW_S)
        count, tokens = traffic.arrivals, traffic.input_tokens
        self._arrivals = self._arrivals * keep + count
        self._inputs = self._inputs * keep + tokens
        # A sum of n lengths differs from n times the mean by n times one length's variance.
        if count:
            self._spread = self._spread * keep + (tokens - count * self.input_tokens) ** 2
            self._seen = self._seen * keep + count
        self._finished = self._finished * keep + traffic.finished
        self._outputs = self._outputs * keep + traffic.output_tokens
        self._computed = self._computed * keep + traffic.computed_prompt_tokens
        self._cached = self._cached * keep + traffic.cached_tokens

    @property
    def input_tokens(self) -> float:
        return max(1.0, self._inputs / self._arrivals) if self._arrivals > 1e-9 else FIRST_INPUT_TOKENS

    @property
    def output_tokens(self) -> float:
        """Short answers finish first: the first few are held against what is usual."""
        known, weight = self._outputs + FIRST_OUTPUT_TOKENS * FIRST_OUTPUT_WEIGHT, self._finished + FIRST_OUTPUT_WEIGHT
        return known / weight

    @property
    def input_variation(self) -> float:
        mean = self.input_tokens
        variance = (self._spread + FIRST_WEIGHT * (FIRST_VARIATION * mean) ** 2) / (self._seen + FIRST_WEIGHT)
        return min(math.sqrt(variance) / mean, MAX_VARIATION)

    @property
    def hit_rate(self) -> float:
        whole = self._computed + self._cached
        return min(self._cached / whole, MAX_HIT_RATE) if whole > 0.0 else 0.0
