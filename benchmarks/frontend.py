"""Our frontend beside NVIDIA Dynamo's: `python -m benchmarks.frontend [--json]`.

Workers that take no time stand behind both, so that what is left is the frontend: its CPU time a request, the
requests it gets through, and the time it adds to each. One system at a time, in turn, on the same machine, with the
same model folder, the same prompts and the same client.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.command import Say
from benchmarks.frontend_comparison import Plan, Report, Words, measure, report
from benchmarks.frontend_servers import DYNAMO_VERSION, dynamo_frontend, dynamo_python, slipstream_frontend
from benchmarks.many_streams import Endurance, Endured, endure, targets
from benchmarks.report import Machine, Target, machine, targets_table
from slipstream import model_folder
from slipstream.errors import SlipstreamError
from slipstream.settings import DEFAULT_MODEL

_RUN_TIMEOUT_S = 1800.0
# A word of its own in a byte-level vocabulary: `Ġ` stands for the space before it.
_WORD = re.compile(r"Ġ([a-z]{2,})")

app = typer.Typer(add_completion=False)


@app.command()
def frontend(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few requests, one round: shows that all works.")] = False,
    dynamo: Annotated[bool, typer.Option("--dynamo/--no-dynamo", help="Measure Dynamo beside it.")] = True,
    processes: Annotated[int, typer.Option("--processes", help="Processes of our frontend.", min=1)] = 1,
    rounds: Annotated[int, typer.Option("--rounds", help="Starts of each system.", min=1)] = Plan().rounds,
    streams: Annotated[int, typer.Option("--streams", help="Instead: this many streams at once.", min=0)] = 0,
    minutes: Annotated[float, typer.Option("--minutes", help="How long --streams goes on.", min=0.05)] = 10.0,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
) -> None:
    """Measure CPU time a request, requests/s and added latency of our frontend and of NVIDIA Dynamo's."""
    if streams:
        endurance = Endurance(streams, minutes * 60, leavers=streams // 20)
        facts = machine()
        endured = command.run(
            lambda logs, say: _endure(endurance, facts, model, processes, logs, say), _RUN_TIMEOUT_S + minutes * 60
        )
        command.show(endured, as_json, _print_endured)
        return
    plan = Plan(requests=200, warm_requests=50, latency_requests=10, rounds=1) if quick else Plan(rounds=rounds)
    facts = machine()
    result = command.run(
        lambda logs, say: _run(plan, facts, model, processes, logs, say, dynamo=dynamo), _RUN_TIMEOUT_S
    )
    command.show(result, as_json, _print)


async def _run(plan: Plan, facts: Machine, model: str, processes: int, logs: Path, say: Say, *, dynamo: bool) -> Report:
    folder = (await asyncio.to_thread(model_folder.resolve, model, weights=False)).path
    words = Words(words_of(folder), plan.seed)
    python, skipped = None, "not asked for (--no-dynamo)"
    if dynamo:
        say(f"looking for Dynamo {DYNAMO_VERSION}, or installing it into an environment of its own")
        try:
            python, skipped = await dynamo_python(model_folder.models_cache(os.environ).parent / "benchmarks"), ""
        except SlipstreamError as error:
            skipped = f"Dynamo {DYNAMO_VERSION} cannot be installed here: {error}"
            say(skipped)
    rounds = []
    for number in range(1, plan.rounds + 1):
        where = logs / str(number)
        where.mkdir()
        say(f"round {number} of {plan.rounds}: slipstream")
        rounds.append(await measure(slipstream_frontend(folder, where, step_s=0, processes=processes), plan, words))
        if python is not None:
            say(f"round {number} of {plan.rounds}: dynamo")
            rounds.append(await measure(dynamo_frontend(python, folder, where, speedup=0), plan, words))
    return report(plan, facts, rounds, skipped or None)


@dataclass(frozen=True, slots=True)
class EnduranceReport:
    plan: Endurance
    machine: Machine
    seen: Endured
    memory_growth: float
    targets: list[Target]


async def _endure(plan: Endurance, facts: Machine, model: str, processes: int, logs: Path, say: Say) -> EnduranceReport:
    folder = (await asyncio.to_thread(model_folder.resolve, model, weights=False)).path
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # Each stream is a connection of this process too.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with slipstream_frontend(
        folder, logs, step_s=plan.step_s, processes=processes, queue=2 * plan.streams
    ) as running:
        say(f"{plan.streams} streams for {plan.seconds:g} s")
        seen = await endure(running, plan)
    return EnduranceReport(plan, facts, seen, seen.memory_growth, targets(plan, seen))


def _print_endured(console: Console, result: EnduranceReport) -> None:
    seen = result.seen
    console.print(
        f"{seen.answers} answers, {seen.tokens} tokens, {seen.left} clients left in the middle; memory "
        f"{seen.memory_mib[0]:.0f} to {seen.memory_mib[-1]:.0f} MiB; {seen.cpu_cores:.2f} cores"
    )
    console.print(targets_table(result.targets))
    for error in seen.errors[:5]:
        console.print(f"[red]{error}[/]")


def words_of(folder: Path) -> list[str]:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(found[1] for token in vocabulary if (found := _WORD.fullmatch(token)))


def _print(console: Console, result: Report) -> None:
    plan = result.plan
    table = Table(title=f"{plan.connections} connections, {plan.max_tokens} tokens streamed", title_justify="left")
    lengths = [str(length) for length in plan.latency_words]
    columns = ["system", "CPU ms a request", "requests/s", "events a request"]
    for column in columns + [f"added p50/p99, {length} words" for length in lengths]:
        table.add_column(column, justify="left" if column == "system" else "right")
    for one in result.systems:
        added = [f"{one.added_p50_ms[length]:.1f} / {one.added_p99_ms[length]:.1f} ms" for length in lengths]
        figures = (f"{one.cpu_ms_per_request:.2f}", f"{one.requests_per_s:.0f}", f"{one.events_per_request:.1f}")
        table.add_row(one.system, *figures, *added)
    console.print(table)
    console.print(targets_table(result.targets))
    if result.skipped:
        console.print(f"[yellow]{result.skipped}[/]")
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores, {result.machine.date}")


if __name__ == "__main__":
    app()
