"""The workloads on which rules for worker counts are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from benchmarks.planner_runs import Workload
from planner.objectives import Objective
from planner.scaling import Counts
from simulator import loads, traces
from simulator.traces import Arrival

FOLDER = Path(__file__).with_name("traces")
MOONCAKE = FOLDER / "mooncake_conversation_trace.jsonl.xz"
AZURE = FOLDER / "azure_llm_conv.csv.xz"

MOONCAKE_SPEED = 2.0
AZURE_SPEEDS = (1.0, 2.0, 3.0)
PIECE = 2
"""Of the recorded traces the first half is replayed: as much as a run of some minutes allows."""

DAY_S = 7200.0
DAY_PEAK_PER_S = 3.0
PROBE_S = 600.0


@lru_cache(maxsize=2)
def trace(name: str) -> tuple[Arrival, ...]:
    """The first part of a trace, at the speed at which it was recorded."""
    every = traces.read_mooncake(MOONCAKE) if name == "mooncake" else traces.read_azure(AZURE)
    return tuple(one for one in every if one.at_s <= every[-1].at_s / PIECE)


def part(arrivals: Iterable[Arrival], from_s: float, to_s: float) -> Iterator[Arrival]:
    """What comes between two times, from 0 on."""
    return (replace(one, at_s=one.at_s - from_s) for one in arrivals if from_s <= one.at_s < to_s)


def mooncake() -> Iterator[Arrival]:
    """Faster than recorded: so that the budget is about what it takes."""
    return traces.at_speed(trace("mooncake"), MOONCAKE_SPEED)


def azure() -> Iterator[Arrival]:
    return rising(trace("azure"), AZURE_SPEEDS)


def rising(arrivals: Iterable[Arrival], speeds: tuple[float, ...]) -> Iterator[Arrival]:
    """One piece of the trace after the other, each of as much recorded time, faster each time."""
    every = list(arrivals)
    piece_s, start_s, number = every[-1].at_s / len(speeds), 0.0, 0
    for one in every:
        while one.at_s >= piece_s * (number + 1) and number + 1 < len(speeds):
            start_s += piece_s / speeds[number]
            number += 1
        yield replace(one, at_s=start_s + (one.at_s - piece_s * number) / speeds[number])


def day() -> Iterable[Arrival]:
    """Quiet, five times as busy, quiet again: a sinusoid, twelve times as fast as a day's."""
    return loads.Synthetic(
        loads.DailyCycle(DAY_PEAK_PER_S, 5.0, DAY_S),
        loads.Lognormal(12_000, 0.6, 64, 40_000),
        loads.Lognormal(400, 0.8, 8, 2_000),
        duration_s=DAY_S,
        seed=1,
    )


def _last_piece() -> Iterator[Arrival]:
    every = list(azure())
    return part(every, every[-1].at_s - PROBE_S / 2, every[-1].at_s + 1)


WORKLOADS = {
    one.name: one
    for one in (
        Workload(
            "mooncake",
            "qwen3-32b-h200-tp4",
            8,
            Objective(10.0, 0.1),
            mooncake,
            Counts(4, 4),
            lambda: part(mooncake(), 0.0, PROBE_S / 2),
            traces.MOONCAKE_BLOCK_TOKENS,
        ),
        Workload("azure rising", "qwen3-32b-h200-tp1", 8, Objective(2.0, 0.05), azure, Counts(4, 4), _last_piece),
        Workload(
            "day",
            "qwen3-32b-h200-tp1",
            8,
            Objective(6.0, 0.05),
            day,
            Counts(4, 4),
            lambda: part(day(), (DAY_S - PROBE_S) / 2, (DAY_S + PROBE_S) / 2),
        ),
    )
}
