"""`python -m benchmarks.simulator_speed`: a million requests through the simulator on one core, and what memory does.

The load is Azure's conversation trace (2023; prompts of 1,155 tokens and answers of 211 on average), over and over, at
as many times its rate as keep 64 workers of a Qwen3-32B profile busy without missing the limits. Everything that a
request meets is the real thing: admission, the router, the schedulers of both of its workers.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import psutil
import typer
from rich.console import Console

from benchmarks import command
from benchmarks.command import Say
from benchmarks.report import Machine, Target, at_most, below, machine, ratio, targets_table
from planner.objectives import Objective
from planner.scaling import Counts
from simulator import traces
from simulator.outcome import Figures
from simulator.run import ModelSetup, Setup, simulate
from simulator.traces import Arrival

TRACE = Path(__file__).with_name("traces") / "azure_llm_conv.csv.xz"
PROMISE = "1,000,000 requests on 64 workers under 10 minutes on one core, memory flat"
LIMIT_MINUTES = 10.0
FLAT = 1.1
"""Memory is flat when it is at most this many times at the end what it was after a quarter of the requests."""

QUARTERS = (0.25, 0.5, 0.75, 1.0)
LIMITS = {"realtime": Objective(2.0, 0.05)}
_TIMEOUT_S = 7200.0

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Setting:
    """`speed`: times the trace's own rate."""

    requests: int
    profile: str
    prefill: int
    decode: int
    speed: float


@dataclass(frozen=True, slots=True)
class Point:
    """At some share of the requests: CPU-seconds since the beginning, and memory."""

    share: float
    requests: int
    cpu_s: float
    rss_mib: float


@dataclass(frozen=True, slots=True)
class Run:
    cpu_s: float
    wall_s: float
    requests_per_cpu_s: float
    virtual_s: float
    points: list[Point]
    figures: Figures
    busy_share: float


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    setting: Setting
    run: Run
    targets: list[Target]


@dataclass(slots=True)
class Measured:
    """Passes a load on, and notes how far it is as it goes by."""

    load: Iterable[Arrival]
    total: int
    began_s: float
    points: list[Point] = field(default_factory=list)

    def __iter__(self) -> Iterator[Arrival]:
        stops = {max(1, round(share * self.total)): share for share in QUARTERS}
        for number, arrival in enumerate(self.load, start=1):
            yield arrival
            if number in stops:
                self.points.append(self._point(stops[number], number))

    def _point(self, share: float, requests: int) -> Point:
        rss_mib = psutil.Process().memory_info().rss / 2**20
        return Point(share, requests, time.process_time() - self.began_s, round(rss_mib, 1))


@app.command()
def main(
    as_json: bool = typer.Option(False, "--json", help="print everything as JSON"),
    requests: int = typer.Option(1_000_000, min=100, help="in all"),
    profile: str = typer.Option("qwen3-32b-h200-tp1", help="of every worker: a name from engine/simulated/profiles"),
    prefill: int = typer.Option(20, min=1, help="prefill workers"),
    decode: int = typer.Option(44, min=1, help="decode workers"),
    speed: float = typer.Option(30.0, min=0.01, help="times the trace's rate"),
) -> None:
    """How fast the simulator simulates, and that its memory does not grow with the load."""
    setting, facts = Setting(requests, profile, prefill, decode, speed), machine()
    result = command.run(lambda logs, say: _measure(setting, facts, say), _TIMEOUT_S)
    command.show(result, as_json, _print)


async def _measure(setting: Setting, facts: Machine, say: Say) -> Report:
    say(f"{setting.requests:,} requests on {setting.prefill} prefill and {setting.decode} decode workers")
    # A process of its own: nothing that was loaded before is in its memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        run = await asyncio.get_running_loop().run_in_executor(pool, measured, setting)
    return Report(facts, setting, run, targets(setting, run))


def measured(setting: Setting) -> Run:
    """One run, in this process."""
    cpu_s, wall_s = time.process_time(), time.monotonic()
    azure = traces.read_azure(TRACE)
    whole = traces.repeated(azure, -(-setting.requests // len(azure)), pause_s=1.0)
    load = Measured(islice(traces.at_speed(whole, setting.speed), setting.requests), setting.requests, cpu_s)
    model = ModelSetup("m", setting.profile, Counts(setting.prefill, setting.decode), LIMITS)
    outcome = simulate(Setup((model,), load))
    cpu_s = time.process_time() - cpu_s
    busy = [one.busy_share for one in outcome.workers]
    return Run(
        cpu_s,
        time.monotonic() - wall_s,
        setting.requests / cpu_s,
        outcome.duration_s,
        load.points,
        outcome.all,
        sum(busy) / len(busy),
    )


def targets(setting: Setting, run: Run) -> list[Target]:
    """The issue's; a smaller run cannot meet them."""
    whole = setting.requests >= 1_000_000 and setting.prefill + setting.decode >= 64
    quarter = next((one.rss_mib for one in run.points if one.share == QUARTERS[0]), None)
    growth = ratio(run.points[-1].rss_mib, quarter) if len(run.points) == len(QUARTERS) else None
    return [
        below("CPU minutes", run.cpu_s / 60.0 if whole else None, LIMIT_MINUTES, PROMISE),
        at_most("memory at the end over memory after a quarter", growth if whole else None, FLAT, PROMISE),
    ]


def _print(console: Console, report: Report) -> None:
    run, setting, figures = report.run, report.setting, report.run.figures
    console.print(
        f"{setting.requests:,} requests, {setting.prefill} prefill and {setting.decode} decode workers of "
        f"{setting.profile}, {setting.speed:g} times Azure's rate: {run.cpu_s:.0f} CPU-seconds, "
        f"{run.requests_per_cpu_s:.0f} requests a CPU-second, {run.virtual_s:.0f} s of virtual time; workers busy "
        f"{run.busy_share:.0%}, {figures.attainment:.2%} within the limits, TTFT p99 {figures.ttft.p99_s:.2f} s"
    )
    for point in run.points:
        console.print(f"  after {point.requests:>9,} requests: {point.cpu_s:7.1f} CPU-seconds, {point.rss_mib:.0f} MiB")
    console.print(targets_table(report.targets))


if __name__ == "__main__":
    app()
