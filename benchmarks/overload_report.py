"""What an overload run shows, whichever way it was made: its targets and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.goodput import Result
from benchmarks.report import Machine, Target, at_least, equals, targets_table

TIMES = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
"""Offered load, in capacities."""

GOODPUT = "overload at 3x capacity: goodput stays above 90% of its maximum"
REALTIME = "realtime traffic keeps its SLO"
REST = "the rest gets 429 with an honest Retry-After"
_KEPT = 0.99
_HONEST = 0.9
_NEAR = (0.8, 1.25)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the ramp that finds the capacity, with every request realtime."""

    offered_per_s: float
    goodput_per_s: float
    ttft_p99_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """All loads on one cluster.

    Attributes:
        how: virtual time, or which processes.
        client_cores: that the load generator used at each load; it is a process of its own.
        late_p99_s: of each load, by how much its requests were sent late.
    """

    how: str
    seed: int
    capacity_per_s: float
    ramp: list[Step]
    loads: list[Result]
    client_cores: list[float]
    server_cores: list[float]
    late_p99_s: list[float]
    targets: list[Target]


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    settings: dict[str, float]
    parts: list[Part]
    targets: list[Target]


def targets(how: str, loads: Sequence[Result]) -> list[Target]:
    """The issue's; `loads` end with the highest."""
    most, top = max(one.goodput_per_s for one in loads), loads[-1]
    realtime = [one.classes[0] for one in loads]
    honest = top.honesty
    low, high = _NEAR
    return [
        at_least(f"{how}: goodput at {top.times_capacity:g}x over the highest", top.goodput_per_s / most, 0.9, GOODPUT),
        at_least(
            f"{how}: realtime requests within their SLO, of all that came, at the worst load",
            min(one.attainment for one in realtime),
            _KEPT,
            REALTIME,
        ),
        equals(f"{how}: requests that failed in any other way than 429", sum(one.unanswered for one in loads), 0, REST),
        at_least(
            f"{how}: let in at once or within one more wait, of those who came back when told to",
            honest.within_one_more if honest else None,
            _HONEST,
            REST,
        ),
        Target(
            f"{how}: real wait over the told one, median",
            value := honest.real_over_told if honest else None,
            f"{REST} (within {low:g} and {high:g} times)",
            met=value is not None and low <= value <= high,
        ),
    ]


def show(console: Console, report: Report) -> None:
    for part in report.parts:
        _show_part(console, part)
    console.print(targets_table(report.targets))


def _show_part(console: Console, part: Part) -> None:
    title = f"{part.how}: capacity {part.capacity_per_s:.2f} requests/s, seed {part.seed}"
    table = Table(title=title, title_justify="left")
    columns = ("load", "offered/s", "goodput/s", "realtime in SLO", "TTFT p99", "nearline", "TTFT p99", "batch")
    for column in (*columns, "refused", "failed", "back", "at once", "one more", "real / told", "told p50"):
        table.add_column(column)
    for one in part.loads:
        realtime, nearline, batch = one.classes
        honest = one.honesty
        said = (
            (
                str(honest.came_back),
                f"{honest.at_once:.1%}",
                f"{honest.within_one_more:.1%}",
                f"{honest.real_over_told:.2f}",
                f"{honest.told_p50_s:.0f} s",
            )
            if honest
            else ("-",) * 5
        )
        table.add_row(
            f"{one.times_capacity:g}x",
            f"{one.offered_per_s:.2f}",
            f"{one.goodput_per_s:.2f}",
            f"{realtime.attainment:.1%}",
            f"{realtime.ttft_p99_s:.2f} s",
            f"{nearline.good_per_s:.2f}/s",
            f"{nearline.ttft_p99_s:.2f} s",
            f"{batch.good_per_s:.2f}/s",
            str(sum(one.refusals.values())),
            str(one.unanswered),
            *said,
        )
    console.print(table)
    if part.client_cores:
        console.print(
            f"load generator: up to {max(part.client_cores):.2f} cores, requests sent late by up to "
            f"{max(part.late_p99_s) * 1e3:.0f} ms (p99); cluster: up to {max(part.server_cores):.2f} cores"
        )
