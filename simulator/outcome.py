"""What a simulation showed: figures by model and class, series over time, decisions and workers. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from simulator.journey import Journey
from simulator.scaling import Decided
from slipstream.latency_counts import LatencyCounts


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds; percentiles are exact to 5%, the mean is exact. Of nothing they are all 0."""

    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float

    @classmethod
    def of(cls, counts: LatencyCounts) -> Latencies:
        return cls(counts.mean_s, *(counts.percentile_s(percent) for percent in (50, 90, 95, 99)))


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one model's requests of one class, or of all.

    Attributes:
        refused: turned away before any worker had them; failed: given up later.
        good: finished within the limits of their class; a class without limits is good when it finishes.
        attainment: good, of all that came. goodput_per_s: good, each second of the run.
        ttft_attainment, itl_attainment: of all that came, those that kept one limit.
        hit_rate: prompt tokens that no worker had to compute, of all.
    """

    model: str
    service_class: str
    requests: int
    refused: int
    failed: int
    finished: int
    good: int
    attainment: float
    ttft_attainment: float
    itl_attainment: float
    goodput_per_s: float
    input_tokens: int
    output_tokens: int
    hit_rate: float
    ttft: Latencies
    itl: Latencies
    e2e: Latencies


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests of one class are to keep."""

    model: str
    service_class: str
    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class Interval:
    """One model in one piece of the run, which ends at `at_s`; counts of workers and requests are of that moment.

    Attributes:
        queued: requests that wait at the frontends; waiting: at the workers; running: there, computed or generated for.
    """

    at_s: float
    model: str
    arrivals: int
    refused: int
    failed: int
    finished: int
    good: int
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    queued: int
    waiting: int
    running: int
    prefill: int
    decode: int
    starting: int
    draining: int
    gpus: int


@dataclass(frozen=True, slots=True)
class WorkerLife:
    """One worker; `ended_s` is None where it was there to the end of the run. `role` is its last one."""

    worker_id: str
    model: str
    role: str
    gpus: int
    started_s: float
    ended_s: float | None
    flips: int
    killed: bool
    busy_share: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole run.

    Attributes:
        duration_s: until the last request had ended.
        gpu_hours: of all workers, from the call that starts each to its end, or to the run's.
        good_per_gpu_hour: requests within their limits.
        actions, refused_actions: of the policy, in all; `decisions` tells the first ten thousand that had any.
        journeys: only where they were asked for; they are in no JSON.
    """

    seed: int
    duration_s: float
    gpu_hours: float
    peak_gpus: int
    good_per_gpu_hour: float
    all: Figures
    classes: list[Figures]
    limits: list[Limits]
    series_s: float
    series: list[Interval]
    actions: int
    refused_actions: int
    decisions: list[Decided]
    workers: list[WorkerLife]
    journeys: tuple[Journey, ...] = ()


class _Document(msgspec.Struct):
    slipstream_simulation: int
    outcome: dict[str, object]


def to_json(outcome: Outcome) -> bytes:
    """The same bytes for the same run; one field a line."""
    told = {name: getattr(outcome, name) for name in Outcome.__slots__ if name != "journeys"}
    return msgspec.json.format(msgspec.json.encode(_Document(1, told)), indent=1) + b"\n"
