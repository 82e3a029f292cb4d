"""What overload and soak ask of a cluster: classes, tenants, lengths and their SLOs, drawn beforehand from a seed.

The same arrivals go to real processes (`open_load`) and to the simulator (`overload_simulated`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from simulator.traces import Arrival


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits of one class: time to first token, and mean time between the tokens of one answer."""

    ttft_s: float
    itl_s: float


SLOS = {"realtime": Slo(2.0, 0.1), "nearline": Slo(10.0, 0.2), "batch": Slo(60.0, 0.5)}


@dataclass(frozen=True, slots=True)
class Source:
    """One tenant in one class; `share` of all requests."""

    tenant: str
    service_class: str
    share: float


SOURCES = (
    Source("acme", "realtime", 0.12),
    Source("birch", "realtime", 0.08),
    Source("acme", "nearline", 0.20),
    Source("cedar", "nearline", 0.20),
    Source("birch", "batch", 0.10),
    Source("crawler", "batch", 0.30),
)
"""A fifth is realtime: at three times the capacity that is three fifths of it, so that its SLO can be kept."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, log-uniform between both."""

    prompt: tuple[int, int] = (1024, 8192)
    answer: tuple[int, int] = (32, 256)


LENGTHS = Lengths()
WAITS = {"realtime_wait_s": 1.0, "nearline_wait_s": 5.0, "batch_wait_s": 30.0}
"""Settings of admission: half of what each class's SLO allows until the first token."""


def draw(
    rate_per_s: float, seconds: float, seed: int, lengths: Lengths, sources: tuple[Source, ...] = SOURCES
) -> Iterator[Arrival]:
    """A Poisson process for so many seconds; no prompt shares a prefix with another one."""
    chance, at_s, number = random.Random(seed), 0.0, 0
    shares = [one.share for one in sources]
    while (at_s := at_s + chance.expovariate(rate_per_s)) < seconds:
        (source,) = chance.choices(sources, shares)
        number += 1
        yield Arrival(
            at_s,
            f"o{seed}-{number}",
            _between(chance, lengths.prompt),
            _between(chance, lengths.answer),
            tenant=source.tenant,
            service_class=source.service_class,
        )


def _between(chance: random.Random, limits: tuple[int, int]) -> int:
    low, high = limits
    return round(math.exp(chance.uniform(math.log(low), math.log(high))))


@dataclass(frozen=True, slots=True)
class Patience:
    """What a refused client does: it comes back when it was told to, as OpenAI's clients do, or leaves.

    Attributes:
        longest_s: a client that shall wait longer leaves; OpenAI's wait for no more than a minute.
        tries: in all.
        late_s: it comes back up to so much later than it was told to, by lot.
    """

    longest_s: float = 60.0
    tries: int = 4
    late_s: float = 0.5


PATIENCE = Patience()
