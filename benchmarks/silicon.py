"""The simulator beside real machines: `python -m benchmarks.silicon [--json] [--plot docs/silicon.svg]`.

Rows measured end to end on H100 and H200 (`benchmarks.silicon_rows`) are simulated in their own setting: lengths,
tensor parallelism, workers and clients. Nothing is fitted to them. The package that holds them is installed into an
environment of its own, as by `simulator.gpu_profiles`.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import closed_loop, command
from benchmarks.command import Say
from benchmarks.report import Machine, Target, at_most, machine, targets_table
from benchmarks.silicon_rows import DESCRIBED_SHARE, Row, by_model, read_rows, sample_file
from simulator.gpu_profiles import environment
from slipstream.performance import Predictor

_RUN_TIMEOUT_S = 3600.0
REQUESTS_PER_CLIENT = 10  # InferenceMAX's; the other source does not say
TURN_S = 0.01
FP8_KV_MODEL = "llama-3.1-70b"

TPOT_LIMIT, TTFT_LIMIT = 0.15, 0.25
_TPOT_PROMISE, _TTFT_PROMISE = "15% median for TPOT", "25% for TTFT"

ENVIRONMENT = Path.home() / ".cache" / "slipstream" / "aiconfigurator"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Compared:
    """One row, measured and simulated."""

    name: str
    group: str
    mode: str
    clients: int
    ttft_s: float
    tpot_s: float
    simulated_ttft_s: float
    simulated_tpot_s: float
    preemptions: int

    @property
    def ttft_off(self) -> float:
        return self.simulated_ttft_s / self.ttft_s - 1

    @property
    def tpot_off(self) -> float:
        return self.simulated_tpot_s / self.tpot_s - 1


@dataclass(frozen=True, slots=True)
class Errors:
    """Of some rows: medians of the absolute errors, and of the signed ones."""

    name: str
    rows: int
    ttft: float | None
    tpot: float | None
    ttft_bias: float | None
    tpot_bias: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """`variants`: other assumptions about what the rows do not say, all rows each."""

    machine: Machine
    left_out: dict[str, int]
    errors: tuple[Errors, ...]
    variants: tuple[Errors, ...]
    rows: tuple[Compared, ...]
    unusable: tuple[Compared, ...]
    targets: tuple[Target, ...]


def _as_described(row: Row) -> tuple[Row, float]:
    return row, 0.0


def _drawn(row: Row) -> tuple[Row, float]:
    return replace(row, least_share=DESCRIBED_SHARE), 0.0


def _pausing(row: Row) -> tuple[Row, float]:
    return row, TURN_S


def _fp8_kv(row: Row) -> tuple[Row, float]:
    if row.model != FP8_KV_MODEL:
        return row, 0.0
    half, twice = row.decode.block_bytes // 2, row.decode.blocks * 2
    profile = msgspec.structs.replace(row.decode, block_bytes=half, blocks=twice)
    return replace(row, prefill=profile, decode=profile), 0.0


VARIANTS: dict[str, Callable[[Row], tuple[Row, float]]] = {
    "all clients draw lengths from 0.8 to 1": _drawn,
    "clients pause 10 ms": _pausing,
    "Llama-3.1-70B with fp8 KV (room only)": _fp8_kv,
}


@app.command()
def silicon(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    packages: Annotated[
        Path, typer.Option("--environment", help="With aiconfigurator; made when it is not there.")
    ] = ENVIRONMENT,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write the scatter plot here.", show_default=False)
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1)] = 1,
) -> None:
    """Compare simulated TTFT and TPOT with measured ones. Takes some minutes of one core."""
    facts = machine()
    result = command.run(lambda _logs, say: _run(facts, packages, processes, say), _RUN_TIMEOUT_S)
    if plot is not None:
        _plot(result.rows, plot)
    command.show(result, as_json, _print)


async def _run(facts: Machine, packages: Path, processes: int, say: Say) -> Report:
    python = await asyncio.to_thread(environment, packages)
    every, left_out = read_rows(sample_file(python))
    say(f"{len(every)} rows of our models; left out: {dict(left_out)}")
    rows = [row for row in every if row.fits and row.possible]
    unusable = [row for row in every if not (row.fits and row.possible)]
    counts = dict(left_out)
    counts["does not fit into the KV cache as the profile counts it"] = sum(not row.fits for row in every)
    counts["faster than the GPUs' memory"] = sum(row.fits and not row.possible for row in every)
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(processes, initializer=os.nice, initargs=(5,)) as pool:

        async def compared(chosen: Sequence[Row], change: Callable[[Row], tuple[Row, float]]) -> list[Compared]:
            return list(await asyncio.gather(*(loop.run_in_executor(pool, compare, row, change) for row in chosen)))

        shown = await compared(rows, _as_described)
        say("the usable rows are simulated")
        rest = await compared(unusable, _as_described)
        variants = []
        for name, change in VARIANTS.items():
            chosen = every if change is _fp8_kv else rows
            chosen = [row for row in chosen if row.possible and (change is not _fp8_kv or row.model == FP8_KV_MODEL)]
            variants.append(errors(name, await compared(chosen, change)))
            say(name)
    groups = [errors("all", shown)]
    groups += [errors(mode, [one for one in shown if one.mode == mode]) for mode in ("agg", "disagg")]
    names = {row.name: group for group, members in by_model(rows) for row in members}
    groups += [errors(group, [one for one in shown if names[one.name] == group]) for group in sorted({*names.values()})]
    groups.append(errors("unusable, not counted above", rest))
    return Report(
        facts,
        counts,
        tuple(groups),
        tuple(variants),
        tuple(shown),
        tuple(rest),
        targets(groups[0], groups[1], groups[2]),
    )


def compare(row: Row, change: Callable[[Row], tuple[Row, float]]) -> Compared:
    """Simulate a row under what `change` assumes of it."""
    assumed, turn_s = change(row)
    load = closed_loop.Load(
        assumed.input_tokens,
        assumed.output_tokens,
        assumed.clients,
        assumed.clients * REQUESTS_PER_CLIENT,
        assumed.least_share,
        turn_s,
    )
    if assumed.mode == "agg":
        got = closed_loop.aggregated(Predictor(assumed.decode), load)
    else:
        got = closed_loop.disaggregated((assumed.prefill, assumed.decode), assumed.workers, load)
    return Compared(
        row.name,
        f"{row.model}-{row.decode.device}",
        row.mode,
        row.clients,
        row.ttft_s,
        row.tpot_s,
        got.ttft_s,
        got.tpot_s,
        got.preemptions,
    )


def errors(name: str, rows: Sequence[Compared]) -> Errors:
    """Medians over rows; None of nothing."""
    if not rows:
        return Errors(name, 0, None, None, None, None)
    ttft, tpot = [one.ttft_off for one in rows], [one.tpot_off for one in rows]
    return Errors(
        name,
        len(rows),
        statistics.median(map(abs, ttft)),
        statistics.median(map(abs, tpot)),
        statistics.median(ttft),
        statistics.median(tpot),
    )


def targets(every: Errors, aggregated: Errors, disaggregated: Errors) -> tuple[Target, ...]:
    """Over all rows, and of each mode on its own."""
    found = []
    for of in (every, aggregated, disaggregated):
        found.append(at_most(f"median absolute error of TPOT, {of.name}", of.tpot, TPOT_LIMIT, _TPOT_PROMISE))
        found.append(at_most(f"median absolute error of TTFT, {of.name}", of.ttft, TTFT_LIMIT, _TTFT_PROMISE))
    return tuple(found)


def _print(console: Console, result: Report) -> None:
    for title, of in (("Usable rows", result.errors), ("Other assumptions", result.variants)):
        table = Table(title=title, title_justify="left")
        for column in ("rows of", "rows", "TTFT error", "TPOT error", "TTFT bias", "TPOT bias"):
            table.add_column(column, justify="left" if column == "rows of" else "right")
        for one in of:
            cells = ["" if value is None else f"{value:+.1%}" for value in (one.ttft_bias, one.tpot_bias)]
            medians = ["" if value is None else f"{value:.1%}" for value in (one.ttft, one.tpot)]
            table.add_row(one.name, str(one.rows), *medians, *cells)
        console.print(table)
    for rule, count in result.left_out.items():
        console.print(f"left out: {count} rows: {rule}")
    console.print(targets_table(result.targets))
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores, {result.machine.date}")


def _plot(rows: Sequence[Compared], path: Path) -> None:
    from matplotlib import pyplot as plt  # a development dependency

    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "slipstream"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axis, name, within in ((axes[0], "ttft", TTFT_LIMIT), (axes[1], "tpot", TPOT_LIMIT)):
        for group in sorted({(one.group, one.mode) for one in rows}):
            mine = [one for one in rows if (one.group, one.mode) == group]
            measured = [getattr(one, f"{name}_s") * 1e3 for one in mine]
            simulated = [getattr(one, f"simulated_{name}_s") * 1e3 for one in mine]
            axis.scatter(
                measured, simulated, s=9, label=f"{group[0]} {group[1]}", marker="^" if group[1] != "agg" else "o"
            )
        ends = axis.get_xlim()
        low, high = max(ends[0], 1.0), ends[1] * 1.1
        axis.plot([low, high], [low, high], color="gray", linewidth=0.8)
        for share in (1 - within, 1 + within):
            axis.plot([low, high], [low * share, high * share], color="gray", linewidth=0.6, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel=f"measured {name.upper()}, ms", ylabel="simulated, ms")
        axis.set_title(f"{name.upper()} (dotted: {within:.0%})", fontsize=9)
    axes[0].legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    app()
