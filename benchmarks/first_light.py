"""The cluster beside one aggregated engine: `python -m benchmarks.first_light [--json]`.

Both answer the same prompts, one server at a time, on the same cores. The figure that matters is the inter-token
latency of steady streams while a long prompt is computed: the aggregated engine makes them wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.cluster_server import WorkerFacts, cluster
from benchmarks.command import Say
from benchmarks.comparison import Report, Seen, Settings, SystemResult, measure, report
from benchmarks.phases import InterferencePlan
from benchmarks.prompts import word_ids
from benchmarks.report import Machine, machine, targets_table
from benchmarks.samples import Spread
from benchmarks.server import Server
from benchmarks.vllm_server import aggregated
from engine import device as devices
from slipstream import model_folder
from slipstream.settings import DEFAULT_MODEL
from slipstream.worker_settings import WorkerSettings

_RUN_TIMEOUT_S = 1500.0

# What a machine does on its own; with more, somebody else was computing.
_QUIET_CORES = 0.1

_QUICK = InterferencePlan(rounds=1, prompts=2, samples=0, limit_s=30.0)

app = typer.Typer(add_completion=False)


@app.command()
def first_light(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few requests only: shows that all works.")] = False,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts and their order.")] = 2,
) -> None:
    """Measure TTFT, ITL and tokens/s of a cluster and of one aggregated engine. Takes some minutes."""
    dtype = devices.choose_dtype("auto", "cpu", devices.cpu_flags())
    settings = Settings(model=model, dtype=dtype, seed=seed)
    if quick:
        settings = Settings(model=model, dtype=dtype, seed=seed, requests=6, interference=_QUICK)
    facts = machine()
    result = command.run(lambda logs, say: _run(settings, facts, logs, say), _RUN_TIMEOUT_S)
    command.show(result, as_json, _print)


async def _run(settings: Settings, machine: Machine, logs: Path, say: Say) -> Report:
    folder = await asyncio.to_thread(model_folder.resolve, settings.model)
    return report(settings, machine, await _all(settings, folder.path, logs, say))


async def _all(settings: Settings, model: Path, logs: Path, say: Say) -> list[Seen]:
    words = word_ids(model)
    facts: list[WorkerFacts] = []

    @asynccontextmanager
    async def disaggregated() -> AsyncIterator[Server]:
        async with cluster(settings.model, logs) as (server, found):
            facts.append(found)
            yield server

    say("starting the cluster")
    description = "slipstream up: one prefill and one decode worker, default settings"
    seen = [await measure(disaggregated(), description, settings, words, say)]
    step_tokens = devices.choose_step_tokens(
        None, WorkerSettings.model_fields["max_running"].default, "cuda" if facts[0].device == "cuda" else "cpu"
    )
    rivals: list[tuple[str, int | None, str]] = [("aggregated", None, "one vLLM engine, its own step size")]
    if step_tokens is not None:
        text = f"one vLLM engine, at most {step_tokens} tokens a step as in Slipstream's workers"
        rivals.append(("aggregated_small_steps", step_tokens, text))
    for name, tokens, description in rivals:
        say(f"starting {name}: {description}")
        server = aggregated(name, model, logs, facts[0], dtype=settings.dtype, step_tokens=tokens)
        seen.append(await measure(server, description, settings, words, say))
    return seen


def _print(console: Console, result: Report) -> None:
    console.print(_latency_table(result))
    console.print(_interference_table(result.systems))
    console.print(targets_table(result.targets))
    console.print(targets_table(result.comparisons, "Not promised, but worth knowing"))
    facts = result.machine
    console.print(f"{facts.cpu}, {facts.cores} cores, {facts.date}")
    others = max(max(one.others_cores, one.interference.others_cores) for one in result.systems)
    if others > _QUIET_CORES:
        console.print(
            f"[yellow]Other processes took up to {others:.2f} cores meanwhile: measure on a quiet machine.[/]"
        )


def _latency_table(result: Report) -> Table:
    table = Table(title=f"{result.settings.requests} requests, one after another", title_justify="left")
    for column in ("system", "prompt", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "tokens/s", "CPU s a request"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in result.systems:
        for name, one in [*system.by_length.items(), ("all", system.all_lengths)]:
            cells = [*_cells(one.ttft), *_cells(one.itl), f"{one.tokens_per_s:.1f}"]
            table.add_row(system.name, name, *cells, f"{system.cpu_s_per_request:.2f}" if name == "all" else "")
    return table


def _interference_table(systems: list[SystemResult]) -> Table:
    table = Table(title="Steady streams while a long prompt is computed", title_justify="left")
    columns = ("system", "ITL p50", "ITL p99", "ITL max", "samples", "quiet ITL p99", "prompt's TTFT p50", "tokens/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in systems:
        seen = system.interference
        longest, samples = (f"{seen.itl.max_ms:.1f} ms", str(seen.itl.samples)) if seen.itl else ("-", "0")
        quiet, ttft = _cells(seen.itl_quiet)[1], _cells(seen.prefill_ttft)[0]
        speed = f"{seen.tokens_per_s_under_prefill:.1f}"
        table.add_row(system.name, *_cells(seen.itl), longest, samples, quiet, ttft, speed)
    return table


def _cells(of: Spread | None) -> tuple[str, str]:
    return ("-", "-") if of is None else (f"{of.p50_ms:.1f} ms", f"{of.p99_ms:.1f} ms")


if __name__ == "__main__":
    app()
