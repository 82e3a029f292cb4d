"""Slipstream beside vLLM's own disaggregation: `python -m benchmarks.pd_vs_nixl [--json]`.

The same prompts come at the same times to vLLM with NixlConnector (as it is meant, and as shipped), to one aggregated
vLLM engine, and to `slipstream up`; one system at a time, on the same cores.
"""

from __future__ import annotations

import asyncio
import importlib.util
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command, pd_comparison
from benchmarks.arrivals import Load
from benchmarks.cluster_server import cluster
from benchmarks.command import Say
from benchmarks.nixl_pair import Placements, nixl_pair
from benchmarks.pd_comparison import AGGREGATED, AS_SHIPPED, NIXL, SLIPSTREAM, Report, Seen, Settings, report
from benchmarks.prompts import word_ids
from benchmarks.report import Machine, machine, targets_table
from benchmarks.samples import Spread
from benchmarks.server import Server
from benchmarks.vllm_server import aggregated
from engine import device as devices
from slipstream import model_folder
from slipstream.settings import DEFAULT_MODEL

_RUN_TIMEOUT_S = 1500.0

# The first is what all of them can hold. The others are near what two cores can do with such prompts; the pair's
# tokens a second are only its own where it is asked for more than it can give.
LOADS = (
    Load("calm", 100, 0.5, 20, 64, busy=False),
    Load("busy", 100, 8.0, 96, 64, busy=True),
    Load("busy_long_prompts", 500, 2.0, 32, 64, busy=True),
)
_QUICK_LOADS = tuple(replace(load, requests=3, max_tokens=16) for load in LOADS)

app = typer.Typer(add_completion=False)


@app.command()
def pd_vs_nixl(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few requests only: shows that all works.")] = False,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts and their arrival times.")] = 3,
) -> None:
    """Measure TTFT, ITL, tokens/s and CPU seconds beside vLLM's NixlConnector. Takes some minutes."""
    dtype = devices.choose_dtype("auto", "cpu", devices.cpu_flags())
    settings = Settings(model, dtype, seed, _QUICK_LOADS if quick else LOADS)
    facts = machine()
    result = command.run(lambda logs, say: _all(settings, facts, logs, say), _RUN_TIMEOUT_S)
    command.show(result, as_json, _print)


async def _all(settings: Settings, facts: Machine, logs: Path, say: Say) -> Report:
    model = (await asyncio.to_thread(model_folder.resolve, settings.model)).path
    words = word_ids(model)
    skipped: dict[str, str] = {}
    say("starting the cluster")
    async with cluster(settings.model, logs) as (server, worker):
        seen = {SLIPSTREAM: await pd_comparison.measure(server, settings, words, say)}
    say("starting one aggregated engine")
    async with aggregated(AGGREGATED, model, logs, worker, dtype=settings.dtype, step_tokens=None) as server:
        seen[AGGREGATED] = await pd_comparison.measure(server, settings, words, say)
    for name in (NIXL, AS_SHIPPED):
        if importlib.util.find_spec("nixl") is None:
            skipped[name] = "nixl is not installed; `make install` does that"
            continue
        say(f"starting {name}")
        pair = nixl_pair(name, model, logs, worker, dtype=settings.dtype, correct=name == NIXL)
        seen[name] = await _measure_pair(pair, settings, words, say)
    return report(settings, facts, seen, skipped)


async def _measure_pair(
    pair: AbstractAsyncContextManager[tuple[Server, Placements]], settings: Settings, words: list[int], say: Say
) -> Seen:
    async with pair as (server, placements):
        return await pd_comparison.measure(server, settings, words, say, placements.look)


def _print(console: Console, result: Report) -> None:
    for load in result.settings.loads:
        console.print(_load_table(result, load))
    console.print(targets_table(result.targets))
    console.print(targets_table(result.comparisons, "Not promised, but worth knowing"))
    for name, reason in result.skipped.items():
        console.print(f"{name} was not measured: {reason}", style="yellow", markup=False)
    facts = result.machine
    console.print(f"{facts.cpu}, {facts.cores} cores, {facts.date}")
    if result.disturbed:
        words = ", ".join(f"{others:.2f} during {which}" for which, others in result.disturbed.items())
        console.print(f"[yellow]Other programs took cores, so these figures do not compare: {words}.[/]")


def _load_table(result: Report, load: Load) -> Table:
    title = (
        f"{load.requests} requests of {load.prompt_tokens} tokens, {load.rate_per_s:g} a second, "
        f"{load.max_tokens} tokens of answer"
    )
    table = Table(title=title, title_justify="left")
    columns = ("TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "tokens/s", "CPU s", "idle cores", "failed")
    table.add_column("system")
    for column in columns:
        table.add_column(column, justify="right")
    for system in result.systems:
        one = system.loads[load.name]
        cells = (*_cells(one.ttft), *_cells(one.itl), f"{one.tokens_per_s:.1f}", f"{one.cpu_s:.1f}")
        table.add_row(system.description, *cells, f"{system.idle_cores:.2f}", str(one.failed))
    return table


def _cells(of: Spread | None) -> tuple[str, str]:
    return ("-", "-") if of is None else (f"{of.p50_ms:,.0f} ms", f"{of.p99_ms:,.0f} ms")


if __name__ == "__main__":
    app()
