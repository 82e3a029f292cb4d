"""Our planner beside other rules for worker counts: `python -m benchmarks.planner [--json] [--only day]`.

Mooncake's conversation trace, Azure's conversation trace at rising rates, and a day with a five times higher peak, on
simulated H200 workers; the workloads are in `benchmarks.planner_loads`. The oracle is the best of all static splits
within the budget, found by search with the whole load known: of those with 99% SLO attainment the one with the most
goodput per GPU-hour.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command, planner_runs
from benchmarks.command import Say
from benchmarks.planner_loads import WORKLOADS
from benchmarks.planner_runs import OURS, RULES, START_S, Measured
from benchmarks.report import Machine, Target, at_least, machine, ratio, targets_table

_RUN_TIMEOUT_S = 7200.0
WANTED = 0.99
ORACLE = "oracle"
CHANGING = "day"

_ORACLE_PROMISE = "at least 0.95 of the oracle's goodput per GPU-hour with no knowledge of the future"
_RULES_PROMISE = "1.3x the best of the other rules on the changing day"
_SLO_PROMISE = "SLO attainment of 99% where the oracle has it"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """What all rules share. `limits`: TTFT and ITL in seconds, by workload."""

    start_s: float
    workers: dict[str, int]
    profiles: dict[str, str]
    limits: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Report:
    """`searched`: every static split that was tried for the oracle; probes are of the hardest part of a load."""

    machine: Machine
    plan: Plan
    results: tuple[Measured, ...]
    searched: tuple[Measured, ...]
    targets: tuple[Target, ...]


@app.command()
def planner(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    only: Annotated[str, typer.Option("--only", help=f"One of: {', '.join(WORKLOADS)}.")] = "",
    processes: Annotated[int, typer.Option("--processes", min=1)] = 1,
) -> None:
    """Compare goodput per GPU-hour and SLO attainment. Takes about ten minutes of one core."""
    if only and only not in WORKLOADS:
        raise typer.BadParameter(f"{only!r} is none of {', '.join(WORKLOADS)}", param_hint="--only")
    names = [only] if only else list(WORKLOADS)
    facts = machine()
    result = command.run(lambda _logs, say: _run(facts, names, processes, say), _RUN_TIMEOUT_S)
    command.show(result, as_json, _print)


async def _run(facts: Machine, names: Sequence[str], processes: int, say: Say) -> Report:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(processes, initializer=os.nice, initargs=(5,)) as pool:

        async def by_rule(name: str, rule: str) -> Measured:
            found = await loop.run_in_executor(pool, run_rule, name, rule)
            say(f"{name}: {rule}: {found.attainment:.1%}, {found.good_per_gpu_hour:.0f} a GPU-hour")
            return found

        async def by_search(name: str) -> tuple[Measured, list[Measured]]:
            best, tried = await loop.run_in_executor(pool, search, name)
            say(f"{name}: oracle {best.counts}: {best.attainment:.1%}, {best.good_per_gpu_hour:.0f} a GPU-hour")
            return best, tried

        searches = asyncio.gather(*(by_search(name) for name in names))
        ruled = await asyncio.gather(*(by_rule(name, rule) for name in names for rule in RULES))
        found = await searches
    results = sorted((*(best for best, _ in found), *ruled), key=lambda one: names.index(one.workload))
    searched = tuple(one for _, tried in found for one in tried)
    chosen = [WORKLOADS[name] for name in names]
    plan = Plan(
        START_S,
        {one.name: one.workers for one in chosen},
        {one.name: one.profile for one in chosen},
        {one.name: (one.objective.ttft_s, one.objective.itl_s) for one in chosen},
    )
    return Report(facts, plan, tuple(results), searched, targets(results))


def run_rule(name: str, rule: str) -> Measured:
    """In a process of its own: a workload's functions are not sent."""
    return planner_runs.run(WORKLOADS[name], rule)


def search(name: str) -> tuple[Measured, list[Measured]]:
    """The oracle of a workload, named so, and its search."""
    best, tried = planner_runs.oracle(WORKLOADS[name], WANTED)
    values = {field: getattr(best, field) for field in Measured.__slots__}
    return Measured(**values | {"rule": ORACLE}), tried


def targets(results: Sequence[Measured]) -> tuple[Target, ...]:
    """For each workload that was run."""
    found: list[Target] = []
    for name in dict.fromkeys(one.workload for one in results):
        mine = {one.rule: one for one in results if one.workload == name}
        ours, best = mine[OURS], mine[ORACLE]
        share = ratio(ours.good_per_gpu_hour, best.good_per_gpu_hour)
        found.append(at_least(f"{name}: goodput per GPU-hour against the oracle", share, 0.95, _ORACLE_PROMISE))
        if best.attainment >= WANTED:
            found.append(at_least(f"{name}: SLO attainment", ours.attainment, WANTED, _SLO_PROMISE))
        if name == CHANGING:
            others = [one.good_per_gpu_hour for one in mine.values() if one.rule not in (OURS, ORACLE)]
            share = ratio(ours.good_per_gpu_hour, max(others))
            found.append(at_least(f"{name}: goodput per GPU-hour against the best rule", share, 1.3, _RULES_PROMISE))
            keeping = [
                one.good_per_gpu_hour
                for one in mine.values()
                if one.rule not in (OURS, ORACLE) and one.attainment >= WANTED
            ]
            share = ratio(ours.good_per_gpu_hour, max(keeping, default=None))
            name_of = f"{name}: goodput per GPU-hour against the best rule that keeps 99%"
            found.append(at_least(name_of, share, 1.3, _RULES_PROMISE))
    return tuple(found)


def _print(console: Console, result: Report) -> None:
    for name in result.plan.workers:
        ttft_s, itl_s = result.plan.limits[name]
        title = f"{name}: {result.plan.workers[name]} x {result.plan.profiles[name]}, TTFT {ttft_s} s, ITL {itl_s} s"
        table = Table(title=title, title_justify="left")
        for column in (
            "rule",
            "last",
            "attained",
            "TTFT",
            "ITL",
            "good/GPU-h",
            "GPU-h",
            "TTFT p99",
            "actions",
            "flips",
        ):
            table.add_column(column, justify="left" if column == "rule" else "right")
        for one in sorted(
            (one for one in result.results if one.workload == name), key=lambda one: -one.good_per_gpu_hour
        ):
            table.add_row(
                one.rule,
                one.counts,
                f"{one.attainment:.2%}",
                f"{one.ttft_attainment:.2%}",
                f"{one.itl_attainment:.2%}",
                f"{one.good_per_gpu_hour:.0f}",
                f"{one.gpu_hours:.2f}",
                f"{one.ttft_p99_s:.2f} s",
                str(one.actions),
                str(one.flips),
            )
        console.print(table)
    console.print(targets_table(result.targets))
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores, {result.machine.date}")


if __name__ == "__main__":
    app()
