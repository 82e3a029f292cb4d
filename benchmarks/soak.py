"""An hour at 80% of capacity: `python -m benchmarks.soak [--json] [--minutes 60] [--engine simulated|vllm]`.

The capacity is measured first, on the same cluster: a ramp until goodput stops growing. Then requests of all classes
and several tenants come as a Poisson process: prompts as token ids and chats in text, streamed and whole, conversations
that grow, and clients that hang up in the middle. Memory of each process, time to first token and between tokens are
compared over time, after a warm-up; files, sockets, threads, tasks, blocks and leases are counted before and after.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command, soak_watch
from benchmarks.command import Say
from benchmarks.goodput import ANSWERED, FAILED, REFUSED, Try
from benchmarks.offered_load import PATIENCE, SOURCES, Lengths
from benchmarks.open_load import Cost, Plan, generate
from benchmarks.overload_real import VLLM, RealWorld, capacity, plan_of, started
from benchmarks.report import Machine, Target, at_least, at_most, equals, machine, targets_table
from benchmarks.samples import percentile
from benchmarks.server import tree_cpu_s
from benchmarks.slope import Slope, slope
from benchmarks.soak_watch import Has, Samples, Watch

TARGET = "an hour-long soak at 80% of capacity with flat memory and stable p99"
SHARE = 0.8
FLAT_PER_HOUR = 0.05
"""Memory is flat when, with 95% confidence, it grows by no more than this share of itself in an hour."""

STABLE = 1.15
"""p99 is stable when that of the last third is at most this much of the first third's."""

_WARM_SHARE = 0.2
_EVERY_S = 5.0
_SETTLE_S = 5.0
_FIRST_S = 15.0
_TASKS_PER_WORKER = 4
"""A stream of prefill and one of decode calls, opened at the first call, with a reader and a writer each."""
_QUIET_S = 30.0
_START_S = 900.0
_LEAST_SAMPLES = 10

SIMULATED = RealWorld(
    "soak with simulated workers",
    2,
    2,
    1.0,
    Lengths((128, 1024), (16, 64)),
    8.0,
    ramp_s=20.0,
    options=("--engine", "simulated", "--profile", "llama-3.1-70b-h200-tp1"),
)
app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Third:
    """A third of the soak after its warm-up. Times of streamed answers; the longest gap is of each answer."""

    answers: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p99_ms: float
    gap_p99_ms: float


@dataclass(frozen=True, slots=True)
class Grown:
    """One process.

    Attributes:
        memory_mib: its median after the warm-up; slope: of that, MiB an hour.
        early_mib, late_mib: medians of the first and last third after the warm-up.
        before, after: when nothing was asked for.
        by_minute_mib: from the beginning on, so that one sees where it becomes flat.
    """

    process: str
    memory_mib: float
    slope: Slope | None
    early_mib: float
    late_mib: float
    before: Has | None
    after: Has | None
    by_minute_mib: list[float]

    @property
    def share_per_hour(self) -> float | None:
        """By what it surely grows, over what it has: the lower limit of the slope, or less than nothing."""
        return None if self.slope is None else self.slope.low / self.memory_mib


@dataclass(frozen=True, slots=True)
class Report:
    """`held_before`, `held_after`: by process and figure; what is not zero there when nobody asks is a leak."""

    machine: Machine
    seed: int
    minutes: float
    capacity_per_s: float
    offered_per_s: float
    outcomes: dict[str, int]
    failures: dict[str, int]
    tokens: int
    thirds: list[Third]
    processes: list[Grown]
    held_before: dict[str, float]
    held_after: dict[str, float]
    generator: Cost
    server_cores: float
    targets: list[Target]


@app.command()
def main(
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
    minutes: Annotated[float, typer.Option(min=0.2, help="of the soak itself")] = 60.0,
    engine: Annotated[Literal["simulated", "vllm"], typer.Option(help="of the workers")] = "simulated",
    seed: Annotated[int, typer.Option(help="of the arrivals")] = 1,
    rate: Annotated[float, typer.Option(min=0.0, help="requests a second; 0: 80% of the capacity")] = 0.0,
) -> None:
    """Soak a cluster, and see whether anything grows."""
    facts = machine()
    world = replace(SIMULATED if engine == "simulated" else replace(VLLM, name="soak with vLLM"), seed=seed)
    timeout_s = _START_S + 60.0 * minutes + 60.0 * len(SOURCES)
    report = command.run(lambda logs, say: soak(world, minutes, rate, facts, logs, say), timeout_s)
    command.show(report, as_json, show)


async def soak(
    world: RealWorld,
    minutes: float,
    rate_per_s: float,
    facts: Machine,
    logs: Path,
    say: Say,
    *,
    first_s: float = _FIRST_S,
    settle_s: float = _SETTLE_S,
    every_s: float = _EVERY_S,
) -> Report:
    """All of it.

    Args:
        rate_per_s: of the soak; 0: 80% of the capacity, which is measured.
        first_s: of a load before anything is counted.
        settle_s: before counting.

    Raises:
        StartupError: the cluster or the load generator did not start.
    """
    async with started(world, logs, say) as server:
        folder = logs / world.folder
        most = rate_per_s / SHARE
        if not rate_per_s:
            most, _ = await capacity(server, world, say)
        # Every way is gone once before anything is counted.
        await _load(plan_of(server, world, SHARE * most, first_s, SOURCES, PATIENCE))
        await asyncio.sleep(settle_s)
        held_before = await soak_watch.until_nothing_is_held(server, folder, _QUIET_S)
        before = await asyncio.to_thread(soak_watch.processes, server)
        say(f"{SHARE * most:.2f} of {most:.2f} requests/s for {minutes:g} minutes")
        plan = plan_of(server, world, SHARE * most, 60.0 * minutes, SOURCES, PATIENCE)
        cpu_s = tree_cpu_s(server.pid)
        async with Watch(server, every_s) as watched:
            tries, cost = await _load(plan)
        cores = (tree_cpu_s(server.pid) - cpu_s) / (60.0 * minutes)
        say("waiting until nothing is held")
        await asyncio.sleep(settle_s)
        held_after = await soak_watch.until_nothing_is_held(server, folder, _QUIET_S)
        after = await asyncio.to_thread(soak_watch.processes, server)
    seconds = 60.0 * minutes
    grown = [_grown(name, one, seconds, before, after) for name, one in sorted(watched.by_process.items())]
    thirds = thirds_of(tries, seconds)
    outcomes = Counter(one.outcome for one in tries)
    failures = Counter(one.error for one in tries if one.outcome == FAILED)
    return Report(
        facts,
        world.seed,
        minutes,
        most,
        SHARE * most,
        dict(outcomes),
        dict(failures),
        sum(one.tokens for one in tries),
        thirds,
        grown,
        held_before,
        held_after,
        cost,
        cores,
        targets(thirds, grown, held_before, held_after, outcomes, minutes),
    )


async def _load(plan: Plan) -> tuple[list[Try], Cost]:
    tries, cost = list[Try](), Cost(0.0, 0.0, 0.0)
    async with generate(msgspec.structs.replace(plan, mixed=True)) as lines:
        async for line in lines:
            if isinstance(line, Cost):
                cost = line
            else:
                tries.append(line)
    return tries, cost


def thirds_of(tries: Sequence[Try], seconds: float) -> list[Third]:
    """First, second and last third of what comes after the warm-up."""
    warm_s = _WARM_SHARE * seconds
    length_s = (seconds - warm_s) / 3
    found = []
    for number in range(3):
        begin_s = warm_s + number * length_s
        own = [
            one
            for one in tries
            if begin_s <= one.sent_s < begin_s + length_s and one.outcome == ANSWERED and one.streamed
        ]
        if own:
            found.append(
                Third(
                    len(own),
                    1e3 * percentile([one.ttft_s for one in own], 50),
                    1e3 * percentile([one.ttft_s for one in own], 99),
                    1e3 * percentile([one.itl_s for one in own], 99),
                    1e3 * percentile([one.longest_gap_s for one in own], 99),
                )
            )
    return found


def _grown(name: str, samples: Samples, seconds: float, before: dict[str, Has], after: dict[str, Has]) -> Grown:
    warm_s = _WARM_SHARE * seconds
    rows = [(at_s, mib) for at_s, mib in zip(samples.times_s, samples.memory_mib, strict=True) if at_s >= warm_s]
    rows = rows or list(zip(samples.times_s, samples.memory_mib, strict=True))
    times_s, memory_mib = [at_s for at_s, _ in rows], [mib for _, mib in rows]
    third = max(1, len(rows) // 3)
    return Grown(
        name,
        median(memory_mib),
        slope(times_s, memory_mib) if len(rows) >= _LEAST_SAMPLES else None,
        median(memory_mib[:third]),
        median(memory_mib[-third:]),
        before.get(name),
        after.get(name),
        _by_minute(samples),
    )


def _by_minute(samples: Samples) -> list[float]:
    minutes: dict[int, list[float]] = {}
    for at_s, mib in zip(samples.times_s, samples.memory_mib, strict=True):
        minutes.setdefault(int(at_s // 60), []).append(mib)
    return [median(minutes[minute]) for minute in sorted(minutes)]


def targets(
    thirds: Sequence[Third],
    grown: Sequence[Grown],
    held_before: dict[str, float],
    held_after: dict[str, float],
    outcomes: Counter[str],
    minutes: float,
) -> list[Target]:
    """The issue's, each with what it means here."""
    shares = [share for one in grown if (share := one.share_per_hour) is not None]
    first, last = (thirds[0], thirds[-1]) if len(thirds) == 3 else (None, None)
    both = first is not None and last is not None
    left = sum(soak_watch.still_held(held_after).values())
    tasks = [held.get("frontend slipstream_frontend_tasks", 0.0) for held in (held_before, held_after)]
    return [
        at_least("minutes", minutes, 60.0, TARGET),
        at_most(
            "memory: what the process that grows most surely grows in an hour, of itself",
            max(shares) if shares else None,
            FLAT_PER_HOUR,
            f"{TARGET} (at most {FLAT_PER_HOUR:.0%} of it)",
        ),
        at_most(
            "TTFT p99, last third over first",
            last.ttft_p99_ms / first.ttft_p99_ms if both and last and first else None,
            STABLE,
            f"{TARGET} (at most {STABLE:g} times)",
        ),
        at_most(
            "ITL p99, last third over first",
            last.itl_p99_ms / first.itl_p99_ms if both and last and first else None,
            STABLE,
            f"{TARGET} (at most {STABLE:g} times)",
        ),
        equals("requests that failed", outcomes[FAILED], 0, f"{TARGET}, nothing lost"),
        equals("requests, blocks and leases held when all had gone", left, 0, f"{TARGET}, nothing leaked"),
        at_most("files and sockets: more than before", _more(grown, "fds"), 0, f"{TARGET}, nothing leaked"),
        at_most("threads of all processes: more than before", _more(grown, "threads"), 0, f"{TARGET}, nothing leaked"),
        at_most(
            "tasks of the frontend: more than before, where each worker's streams may have been opened meanwhile",
            tasks[1] - tasks[0],
            _TASKS_PER_WORKER * sum("-" in one.process for one in grown),
            f"{TARGET}, nothing leaked",
        ),
        at_most("refused, of all tries", outcomes[REFUSED] / max(1, outcomes.total()), 0.01, f"{TARGET}: below it"),
    ]


def _more(grown: Sequence[Grown], what: str) -> float:
    """Summed over processes that have more of it than before; where one has less, that makes up for nothing."""
    return float(
        sum(
            max(0, getattr(one.after, what) - getattr(one.before, what))
            for one in grown
            if one.before is not None and one.after is not None
        )
    )


def show(console: Console, report: Report) -> None:
    table = Table(title=f"{report.offered_per_s:.2f} requests/s for {report.minutes:g} minutes", title_justify="left")
    for column in ("third", "answers", "TTFT p50", "p99", "ITL p99", "longest gap p99"):
        table.add_column(column)
    for name, one in zip(("first", "second", "last"), report.thirds, strict=False):
        times = (one.ttft_p50_ms, one.ttft_p99_ms, one.itl_p99_ms, one.gap_p99_ms)
        table.add_row(name, str(one.answers), *(f"{value:.1f} ms" for value in times))
    console.print(table)
    table = Table(title="Processes", title_justify="left")
    for column in ("process", "MiB", "MiB/h (95%)", "first third", "last third", "files", "sockets", "threads"):
        table.add_column(column)
    for grown in report.processes:
        told = grown.slope
        table.add_row(
            grown.process,
            f"{grown.memory_mib:.1f}",
            f"{told.per_hour:+.2f} ({told.low:+.2f} to {told.high:+.2f})" if told else "-",
            f"{grown.early_mib:.1f}",
            f"{grown.late_mib:.1f}",
            *(_both(grown, what) for what in ("fds", "sockets", "threads")),
        )
    console.print(table)
    console.print(f"outcomes: {report.outcomes}; failures: {report.failures}; {report.tokens} tokens")
    console.print(
        f"load generator: {report.generator.cores:.2f} cores, late by {1e3 * report.generator.late_p99_s:.0f} ms "
        f"(p99); cluster: {report.server_cores:.2f} cores"
    )
    console.print(targets_table(report.targets))


def _both(grown: Grown, what: str) -> str:
    if grown.before is None or grown.after is None:
        return "-"
    return f"{getattr(grown.before, what)} -> {getattr(grown.after, what)}"


if __name__ == "__main__":
    app()
