"""Synthetic loads: when requests come, how long they are, and what they share. Streamed, and the same for a seed.

Times: a rate that may change (`Constant`, `DailyCycle`, `Steps`), drawn from as a Poisson process, or in bursts
(`Gamma`: gaps of a given coefficient of variation; `Switching`: a two-state Markov-modulated Poisson process).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from simulator.traces import Arrival


class Rate(Protocol):
    """Requests a second, by time."""

    def at(self, time_s: float) -> float: ...

    @property
    def peak_per_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Constant:
    per_s: float

    def at(self, time_s: float) -> float:
        return self.per_s

    @property
    def peak_per_s(self) -> float:
        return self.per_s


@dataclass(frozen=True, slots=True)
class DailyCycle:
    """A sinusoid between trough and peak; it begins at the trough.

    Attributes:
        peak_to_trough: 5 is a day whose busiest moment has five times the load of its quietest.
        phase_s: how far into the cycle the load begins.
    """

    peak_per_s: float
    peak_to_trough: float = 5.0
    period_s: float = 86400.0
    phase_s: float = 0.0

    def at(self, time_s: float) -> float:
        trough = self.peak_per_s / self.peak_to_trough
        share = (1.0 - math.cos(2 * math.pi * (time_s + self.phase_s) / self.period_s)) / 2
        return trough + (self.peak_per_s - trough) * share


@dataclass(frozen=True, slots=True)
class Steps:
    """One rate after the other: (from when on, requests a second), by rising time; 0 before the first."""

    steps: Sequence[tuple[float, float]]

    def at(self, time_s: float) -> float:
        per_s = 0.0
        for from_s, rate in self.steps:
            if from_s > time_s:
                break
            per_s = rate
        return per_s

    @property
    def peak_per_s(self) -> float:
        return max(rate for _, rate in self.steps)


class Gaps(Protocol):
    """How arrivals are spread around a rate: gaps in units of the mean gap, 1 on average."""

    def draw(self, random: Random) -> Iterator[float]: ...


@dataclass(frozen=True, slots=True)
class Poisson:
    def draw(self, random: Random) -> Iterator[float]:
        while True:
            yield random.expovariate(1.0)


@dataclass(frozen=True, slots=True)
class Even:
    """One after the other, like clockwork."""

    def draw(self, random: Random) -> Iterator[float]:
        while True:
            yield 1.0


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps of a gamma distribution: a coefficient of variation of 1 is Poisson, above it requests come in bursts."""

    variation: float = 3.0

    def draw(self, random: Random) -> Iterator[float]:
        shape = 1.0 / self.variation**2
        while True:
            yield random.gammavariate(shape, 1.0 / shape)


@dataclass(frozen=True, slots=True)
class Switching:
    """A Markov-modulated Poisson process of two states: quiet, and bursts of `burst` times the quiet rate.

    Attributes:
        burst_share: of the time (at a constant rate) in bursts; burst_requests: mean number of requests in one.
    """

    burst: float = 5.0
    burst_share: float = 0.1
    burst_requests: float = 50.0

    def draw(self, random: Random) -> Iterator[float]:
        quiet = 1.0 / (1.0 - self.burst_share + self.burst_share * self.burst)
        rates = quiet, quiet * self.burst
        burst_length = self.burst_requests / rates[1]
        lengths = burst_length * (1.0 - self.burst_share) / self.burst_share, burst_length
        state, left, gap = 0, random.expovariate(1.0 / lengths[0]), 0.0
        while True:
            step = random.expovariate(rates[state])
            if step < left:
                left -= step
                yield gap + step
                gap = 0.0
            else:  # without memory: what was drawn beyond the state's end is drawn again in the next
                gap += left
                state = 1 - state
                left = random.expovariate(1.0 / lengths[state])


class Lengths(Protocol):
    """Tokens of a prompt or an answer."""

    def draw(self, random: Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def draw(self, random: Random) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Of that mean and coefficient of variation, within bounds."""

    mean: float
    variation: float = 1.0
    least: int = 1
    most: int = 1 << 17

    def draw(self, random: Random) -> int:
        sigma2 = math.log(1.0 + self.variation**2)
        tokens = random.lognormvariate(math.log(self.mean) - sigma2 / 2, math.sqrt(sigma2))
        return min(max(round(tokens), self.least), self.most)


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Prompts begin with one of a few texts, such as system prompts; the first are asked for most.

    Attributes:
        tokens: of each; a shorter prompt has as much of it as it is long.
        skew: popularity falls as 1 / rank**skew; 0: all the same.
    """

    count: int
    tokens: int
    skew: float = 1.0


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A load; each iteration is the same one.

    Attributes:
        requests: ends the load where `duration_s` does not; each is without limit when infinite or 0.
        prefixes: with it prompts have block keys; without, nothing can be cached.
        name: what its request ids begin with.
    """

    rate: Rate
    inputs: Lengths
    outputs: Lengths
    duration_s: float = math.inf
    requests: int = 0
    gaps: Gaps = Poisson()
    prefixes: Prefixes | None = None
    block_tokens: int = 16
    seed: int = 0
    model: str = ""
    service_class: str = "realtime"
    tenant: str = ""
    name: str = "s"

    def __iter__(self) -> Iterator[Arrival]:
        random = Random(f"{self.seed}/{self.name}")
        chains = _Chains(self.prefixes, self.block_tokens, random) if self.prefixes is not None else None
        for number, at_s in enumerate(self._times(random)):
            tokens = self.inputs.draw(random)
            yield Arrival(
                at_s,
                f"{self.name}{number}",
                tokens,
                self.outputs.draw(random),
                chains.keys(tokens) if chains is not None else (),
                self.tenant,
                self.service_class,
                "",
                self.model,
            )
            if number + 1 == self.requests:
                return

    def _times(self, random: Random) -> Iterator[float]:
        """Gaps at the peak's rate, thinned where the rate is lower."""
        peak, now_s, rate = self.rate.peak_per_s, 0.0, self.rate
        if peak <= 0:
            return
        steady = isinstance(rate, Constant)
        for gap in self.gaps.draw(random):
            now_s += gap / peak
            if now_s >= self.duration_s:
                return
            if steady or random.random() * peak < rate.at(now_s):
                yield now_s


class _Chains:
    """Block keys of prompts with shared beginnings."""

    def __init__(self, prefixes: Prefixes, block_tokens: int, random: Random) -> None:
        self._random = random
        self._block_tokens = block_tokens
        blocks = prefixes.tokens // block_tokens
        self._shared = [tuple(random.getrandbits(64) for _ in range(blocks)) for _ in range(prefixes.count)]
        self._weights = []
        total = 0.0
        for rank in range(1, prefixes.count + 1):
            total += rank**-prefixes.skew
            self._weights.append(total)

    def keys(self, tokens: int) -> tuple[int, ...]:
        whole, draw = tokens // self._block_tokens, self._random.getrandbits
        shared = self._random.choices(self._shared, cum_weights=self._weights)[0][:whole]
        return shared + tuple(draw(64) for _ in range(whole - len(shared)))


def merged(*loads: Iterable[Arrival]) -> Iterator[Arrival]:
    """Several loads as one, in order of time. Give each a name of its own: request ids must differ."""
    return heapq.merge(*loads, key=lambda arrival: arrival.at_s)
