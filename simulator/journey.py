"""What became of one request, and the figures over many of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simulator.traces import Arrival

if TYPE_CHECKING:
    from simulator.underway import Underway

PERCENTILES = (50, 90, 99)


@dataclass(slots=True, eq=False)
class Journey:
    """One request on its way, times in virtual seconds; negative where it has not come so far.

    Attributes:
        cached_tokens: of the prompt, in the prefix cache of whoever computed it; fetched_tokens: from another worker's.
        attempts: dispatches, of which all but one ended with their worker or were taken back for others.
        refused: it was turned away; `error` says why, and `retry_after_s` what its client was told.
    """

    arrival: Arrival
    reason: str = ""
    prefill: str = ""
    decode: str = ""
    begun_s: float = -1.0
    computed_s: float = -1.0
    first_token_s: float = -1.0
    ended_s: float = -1.0
    cached_tokens: int = 0
    fetched_tokens: int = 0
    preemptions: int = 0
    attempts: int = 0
    error: str = ""
    refused: bool = False
    retry_after_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival.at_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.arrival.at_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first; 0 where there is none."""
        after = self.arrival.output_tokens - 1
        return (self.ended_s - self.first_token_s) / after if after > 0 else 0.0


@dataclass(slots=True)
class KeptJourneys:
    """A cluster's watcher that keeps every journey, in the order of arrival."""

    journeys: list[Journey] = field(default_factory=list)

    def arrived(self, under: Underway) -> None:
        self.journeys.append(under.journey)

    def refused(self, under: Underway) -> None: ...
    def computed(self, under: Underway) -> None: ...
    def first_token(self, under: Underway) -> None: ...
    def ended(self, under: Underway) -> None: ...


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds; of nothing they are all 0."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Distribution:
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(float(values.mean()), *(float(one) for one in np.percentile(values, PERCENTILES)))


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run showed.

    Attributes:
        hit_rate: prompt tokens found in the prefix cache of the worker that computed the rest, of all.
        fetch_rate: prompt tokens that it got from another worker's.
        imbalance: of the prompt tokens computed by prefill workers, the busiest one's over the mean.
        attainment: requests that met both limits, of all; goodput_per_s: those, each second of the trace.
    """

    requests: int
    failed: int
    ttft: Distribution
    tpot: Distribution
    e2e: Distribution
    hit_rate: float
    fetch_rate: float
    imbalance: float
    attainment: float
    goodput_per_s: float
    makespan_s: float
    alone_share: float


def summarize(journeys: list[Journey], *, ttft_slo_s: float, tpot_slo_s: float) -> Summary:
    """Figures over all requests. One that failed meets no limit, and is in no distribution."""
    done = [one for one in journeys if one.ended_s >= 0 and not one.error]
    ttft, tpot, e2e = (
        np.array([getattr(one, name) for one in done], np.float64) for name in ("ttft_s", "tpot_s", "e2e_s")
    )
    good = int(((ttft <= ttft_slo_s) & (tpot <= tpot_slo_s)).sum()) if done else 0
    prompt = sum(one.arrival.input_tokens for one in done)
    by_worker: dict[str, int] = {}
    for one in (one for one in done if one.prefill):
        computed = one.arrival.input_tokens - one.cached_tokens - one.fetched_tokens
        by_worker[one.prefill] = by_worker.get(one.prefill, 0) + computed
    last_arrival_s = max((one.arrival.at_s for one in journeys), default=0.0)
    return Summary(
        requests=len(journeys),
        failed=len(journeys) - len(done),
        ttft=Distribution.of(ttft),
        tpot=Distribution.of(tpot),
        e2e=Distribution.of(e2e),
        hit_rate=sum(one.cached_tokens for one in done) / prompt if prompt else 0.0,
        fetch_rate=sum(one.fetched_tokens for one in done) / prompt if prompt else 0.0,
        imbalance=max(by_worker.values()) * len(by_worker) / max(1, sum(by_worker.values())) if by_worker else 1.0,
        attainment=good / len(journeys) if journeys else 1.0,
        goodput_per_s=good / last_arrival_s if last_arrival_s > 0 else 0.0,
        makespan_s=max((one.ended_s for one in done), default=0.0),
        alone_share=sum(not one.prefill for one in done) / len(done) if done else 0.0,
    )
