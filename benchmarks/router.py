"""`python -m benchmarks.router`: routing policies beside each other on a real trace, in the simulator.

Eight prefill and eight decode workers of a Qwen3-32B profile serve Mooncake's conversation trace at the rate at which
round robin just misses its SLO, which is searched first. Every policy sees the same arrivals, the same workers and the
same figures; the simulator runs the live router, the live block index and the simulated engine's scheduler.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.command import Say
from benchmarks.report import Machine, Target, at_least, at_most, machine, ratio, targets_table
from benchmarks.router_policies import LOAD_ONLY, POLICIES, TPOT_SLO_S, TTFT_SLO_S, Setting, replay
from simulator.journey import Distribution, Summary

ATTAINMENT = 0.9
"""The share of requests that has to meet the limits."""

SEARCH_STEPS = 6
_TIMEOUT_S = 3600.0
_POINTS = ("p50", "p90", "p99")
NO_WORSE = 1.01
"""A policy is no worse than another one if it is within this factor: less is the order in which things happen."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class OfPolicy:
    policy: str
    summary: Summary


@dataclass(frozen=True, slots=True)
class Report:
    """`searched`: the attainment of round robin at each speed that was tried."""

    setting: Setting
    machine: Machine
    slo: str
    searched: dict[str, float]
    policies: list[OfPolicy]
    targets: list[Target]


@app.command()
def main(
    as_json: bool = typer.Option(False, "--json", help="print everything as JSON"),
    profile: str = typer.Option("qwen3-32b-h200-tp4", help="of every worker: a name from engine/simulated/profiles"),
    speed: float = typer.Option(0.0, min=0.0, help="times the trace's rate; 0 searches where round robin just misses"),
    requests: int = typer.Option(1 << 30, min=1, help="of the trace's beginning"),
) -> None:
    """Compare routing policies on Mooncake's conversation trace."""
    setting, facts = Setting(profile, 8, 8, speed, requests), machine()
    result = command.run(lambda logs, say: _measure(setting, facts, say), _TIMEOUT_S)
    command.show(result, as_json, _print)


async def _measure(setting: Setting, facts: Machine, say: Say) -> Report:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        searched: dict[str, float] = {}
        if setting.speed == 0:
            setting = replace(setting, speed=await _just_missed(pool, setting, searched, say))
        say(f"at {setting.speed:.3g} times the trace's rate: {', '.join(POLICIES)}")
        summaries = await _all(pool, [(setting, name) for name in POLICIES])
    results = [OfPolicy(name, summary) for name, summary in zip(POLICIES, summaries, strict=True)]
    slo = f"TTFT {TTFT_SLO_S:g} s and {TPOT_SLO_S * 1e3:g} ms a token for {ATTAINMENT:.0%} of the requests"
    return Report(setting, facts, slo, searched, results, targets({one.policy: one.summary for one in results}))


async def _just_missed(pool: ProcessPoolExecutor, setting: Setting, searched: dict[str, float], say: Say) -> float:
    """The least speed, to a few percent, at which round robin falls below the SLO."""
    low, high = 0.25, 16.0  # met by far, missed by far
    for _ in range(SEARCH_STEPS):
        middle = (low * high) ** 0.5
        (summary,) = await _all(pool, [(replace(setting, speed=middle), "round_robin")])
        searched[f"{middle:.3f}"] = summary.attainment
        say(f"round robin at {middle:.3g} times the rate: {summary.attainment:.1%} within the limits")
        if summary.attainment < ATTAINMENT:
            high = middle
        else:
            low = middle
    return high


async def _all(pool: ProcessPoolExecutor, tasks: Sequence[tuple[Setting, str]]) -> list[Summary]:
    loop = asyncio.get_running_loop()
    return list(await asyncio.gather(*(loop.run_in_executor(pool, replay, *task) for task in tasks)))


def targets(results: dict[str, Summary]) -> list[Target]:
    """The issue's."""
    ours = results["kv"]
    load_only = [results[name] for name in LOAD_ONLY]
    found = []
    for point in _POINTS:
        best = min(getattr(one.e2e, point) for one in load_only)
        lower = 1.0 - getattr(ours.e2e, point) / best
        found.append(
            at_least(
                f"end-to-end {point}: how much lower than the best of the load-only policies",
                lower,
                0.2,
                "end-to-end p50 to p99 20-40% lower than the best of the load-only policies",
            )
        )
    best_ttft = min(one.ttft.p90 for one in load_only)
    gain = ratio(best_ttft, ours.ttft.p90)
    found.append(at_least("TTFT p90, the best load-only policy over ours", gain, 2.0, "TTFT p90 2x lower"))
    others = [summary for name, summary in results.items() if name != "kv"]
    worst = max(
        getattr(getattr(ours, kind), point) / max(1e-9, min(getattr(getattr(one, kind), point) for one in others))
        for kind in ("ttft", "e2e")
        for point in _POINTS
    )
    found.append(
        at_most(
            "worst percentile of TTFT and end-to-end, ours over the best other policy",
            worst,
            NO_WORSE,
            "no worse than any other policy at any percentile",
        )
    )
    return found


def _print(console: Console, report: Report) -> None:
    setting = report.setting
    title = (
        f"{setting.prefill} prefill, {setting.decode} decode, {setting.profile}, {setting.speed:.3g} times the rate; "
        f"SLO: {report.slo}"
    )
    table = Table(title=title, title_justify="left")
    for column in (
        "policy",
        "TTFT p50/p90/p99 s",
        "end-to-end p50/p90/p99 s",
        "ms a token p50/p99",
        "cached",
        "fetched",
    ):
        table.add_column(column)
    for column in ("imbalance", "decode alone", "within SLO"):
        table.add_column(column)
    for one in report.policies:
        summary = one.summary
        table.add_row(
            one.policy,
            _points(summary.ttft),
            _points(summary.e2e),
            f"{summary.tpot.p50 * 1e3:.1f} / {summary.tpot.p99 * 1e3:.1f}",
            f"{summary.hit_rate:.1%}",
            f"{summary.fetch_rate:.1%}",
            f"{summary.imbalance:.2f}",
            f"{summary.alone_share:.1%}",
            f"{summary.attainment:.1%}",
        )
    console.print(table)
    console.print(targets_table(report.targets))


def _points(of: Distribution) -> str:
    return f"{of.p50:.2f} / {of.p90:.2f} / {of.p99:.2f}"


if __name__ == "__main__":
    app()
