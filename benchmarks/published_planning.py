"""Published results about worker counts, replayed: rows 1, 4 and 6."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from benchmarks.planner_loads import AZURE, MOONCAKE
from benchmarks.planner_runs import CLASS, MODEL, RULES, START_S, Workload
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.policy import SloPolicy
from planner.scaling import Counts, ScalingPolicy
from simulator import loads, traces
from simulator.outcome import Outcome
from simulator.run import ModelSetup, Setup, profile_named, simulate
from slipstream.performance import Profile
from slipstream.settings import AdmissionSettings

# -- row 1: Llumnix's adaptive split on Azure's conversation trace ------------------------------------------

RATES_PER_S = (7.5, 8.0, 8.5, 9.0, 9.5)
STATIC = {Counts(5, 3): (0.64, 0.48, 0.21, 0.09, 0.06), Counts(6, 2): (0.92, 0.80, 0.58, 0.31, 0.15)}
ADAPTIVE = (1.0, 0.99, 0.77, 0.56, 0.40)
RESCHEDULED = (1.0, 0.99, 0.91, 0.63, 0.44)
AZURE_LIMITS = Objective(6.0, 0.05)
AZURE_REQUESTS = 5000
FACTORS = (1.2, 1.35, 1.5, 1.65, 1.8)
"""Of the published rates; between these the static splits' attainment is interpolated."""

H20_COMPUTE, H20_MEMORY = 989 / 148, 4.8 / 4.0
"""H200 over H20 in the data sheets: dense bfloat16 TFLOPS, and TB/s of memory."""

# -- row 4: Mooncake's split of sixteen nodes ---------------------------------------------------------------

NODES = 16
NODE_PROFILE = "qwen3-32b-h200-tp2"
NODE_SPEED = 5.0
NODE_REQUESTS = 8000
NODE_DECODES = (2, 3, 4, 5, 6, 8)
MOONCAKE_LIMITS = Objective(10.0, 0.1)

# -- row 6: Dynamo's planner under a sinusoid ---------------------------------------------------------------

SINE_PROFILE = "qwen3-30b-a3b-h200-tp2"
SINE_WORKERS = 8
SINE_LIMITS = Objective(3.0, 0.035)
SINE_S = 900.0
SINE_PUBLISHED_PER_S, SINE_OFFERED_PER_S = 0.9, 10.6
SINE_TTFT_S = 160.0


@dataclass(frozen=True, slots=True)
class Point:
    """One run. `requests_per_s` is the load's."""

    what: str
    requests_per_s: float
    attainment: float
    ttft_mean_s: float
    itl_p99_s: float
    goodput_per_s: float
    gpu_hours: float
    last: str
    flips: int
    refused: int


def h20() -> Profile:
    """Qwen3-32B on one H20, of which there are no tables: H200's, slower by the data sheets' ratios.

    Prompts by the ratio of compute, steps that generate by the ratio of memory bandwidth; 96 GB instead of 141.
    """
    base = profile_named("qwen3-32b-h200-tp1")
    prefill = tuple(msgspec.structs.replace(one, seconds=one.seconds * H20_COMPUTE) for one in base.prefill)
    decode = tuple(msgspec.structs.replace(one, seconds=one.seconds * H20_MEMORY) for one in base.decode)
    room_bytes = 96e9 * 0.9 - 4e9 - 32.762e9
    blocks = int(room_bytes // base.block_bytes)
    longest = min(base.max_model_len, blocks * base.block_tokens)
    return msgspec.structs.replace(
        base, name="qwen3-32b-h20-tp1", prefill=prefill, decode=decode, blocks=blocks, max_model_len=longest
    )


def azure_at(per_s: float, counts: Counts, *, planned: bool = False, admission: bool = False) -> Point:
    """Row 1: the trace's beginning at a rate, on eight workers."""
    arrivals = traces.read_azure(AZURE)[:AZURE_REQUESTS]
    own_per_s = len(arrivals) / arrivals[-1].at_s
    profile = h20()
    policy = ours(profile, 8, AZURE_LIMITS) if planned else None
    outcome = simulate(
        Setup(
            (ModelSetup(MODEL, profile, counts, {CLASS: AZURE_LIMITS}, routing="load"),),
            traces.at_speed(arrivals, per_s / own_per_s),
            policy,
            gpu_budget=8,
            start_s=START_S,
            admission=AdmissionSettings() if admission else None,
            request_timeout_s=36_000.0,
        )
    )
    return point(f"{'planner' if planned else counts}{', admission' if admission else ''}", per_s, outcome)


def mooncake_split(counts: Counts, *, planned: bool = False) -> Point:
    """Row 4: sixteen workers, fixed or with our planner on them."""
    profile = profile_named(NODE_PROFILE, traces.MOONCAKE_BLOCK_TOKENS)
    arrivals = traces.read_mooncake(MOONCAKE)[:NODE_REQUESTS]
    policy = ours(profile, NODES, MOONCAKE_LIMITS) if planned else None
    outcome = simulate(
        Setup(
            (ModelSetup(MODEL, profile, counts, {CLASS: MOONCAKE_LIMITS}),),
            traces.at_speed(arrivals, NODE_SPEED),
            policy,
            gpu_budget=NODES * profile.gpus,
            start_s=START_S,
            admission=None if policy is None else AdmissionSettings(),
        )
    )
    return point("planner" if planned else str(counts), len(arrivals) / arrivals[-1].at_s * NODE_SPEED, outcome)


def sinusoid(rule: str) -> Point:
    """Row 6: 1 to 24 requests a second and back within 900 s, 8,000 tokens in and 1,000 out."""
    load = loads.Synthetic(
        loads.DailyCycle(24.0, 24.0, SINE_S), loads.Fixed(8000), loads.Fixed(1000), duration_s=SINE_S, seed=6
    )
    workload = Workload("sinusoid", SINE_PROFILE, SINE_WORKERS, SINE_LIMITS, lambda: load, Counts(1, 1), lambda: load)
    profile = workload.known()
    outcome = simulate(
        Setup(
            (ModelSetup(MODEL, profile, Counts(1, 1), {CLASS: SINE_LIMITS}),),
            load,
            RULES[rule](workload),
            gpu_budget=SINE_WORKERS * profile.gpus,
            start_s=START_S,
        )
    )
    return point(rule, 12.5, outcome)


def ours(profile: Profile, workers: int, limits: Objective) -> ScalingPolicy:
    """Our planner as it is by default."""
    objectives = ModelObjectives(MODEL, {CLASS: limits})
    return SloPolicy(PlannerObjectives((objectives,), workers * profile.gpus, start_s=START_S), {MODEL: profile})


def point(what: str, per_s: float, outcome: Outcome) -> Point:
    """A run's figures."""
    figures = outcome.all
    last = outcome.decisions[-1].targets.get(MODEL, "") if outcome.decisions else ""
    return Point(
        what,
        per_s,
        figures.attainment,
        figures.ttft.mean_s,
        figures.itl.p99_s,
        figures.good / SINE_S if what in RULES else figures.goodput_per_s,
        outcome.gpu_hours,
        last,
        sum(one.flips for one in outcome.workers),
        figures.refused,
    )


def best_factor(curves: dict[Counts, dict[float, float]]) -> tuple[float, float]:
    """By what the published rates are to be multiplied so that the static splits come nearest to what was published;
    and the mean absolute difference there. `curves`: attainment by rate, of each split."""
    steps = [FACTORS[0] + 0.01 * n for n in range(round((FACTORS[-1] - FACTORS[0]) / 0.01) + 1)]
    return min(((factor, _difference(curves, factor)) for factor in steps), key=lambda one: one[1])


def _difference(curves: dict[Counts, dict[float, float]], factor: float) -> float:
    found = [
        abs(_between(curves[counts], rate * factor) - published)
        for counts, points in STATIC.items()
        for rate, published in zip(RATES_PER_S, points, strict=True)
    ]
    return sum(found) / len(found)


def _between(curve: dict[float, float], at: float) -> float:
    ordered = sorted(curve.items())
    for (low, low_value), (high, high_value) in pairwise(ordered):
        if low <= at <= high:
            return low_value + (high_value - low_value) * (at - low) / (high - low)
    return ordered[0][1] if at < ordered[0][0] else ordered[-1][1]


def rates() -> Iterator[float]:
    """At which the static splits are run before the factor is chosen."""
    middle = RATES_PER_S[len(RATES_PER_S) // 2]
    yield from (middle * factor for factor in FACTORS)
