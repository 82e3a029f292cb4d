"""How fast the simulated scheduler simulates: `python -m benchmarks.simulated_scheduler [--json]`. One core."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.report import Machine, machine
from engine.simulated.request import EventKind, Request
from engine.simulated.scheduler import Scheduler
from slipstream.performance import DecodePoint, PrefillPoint, Profile

_RATE_PER_S = 0.6
_FAMILIES = 50
_CACHE_TOKENS = 800_000

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation; the last two are of CPU time."""

    block_tokens: int
    most_ticks: int
    requests: int
    steps: int
    simulated_s: float
    cpu_s: float
    requests_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    runs: tuple[Run, ...]


@app.command()
def simulated_scheduler(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    requests: Annotated[int, typer.Option("--requests", help="Of each run.", min=1)] = 1000,
) -> None:
    """Simulate one busy worker, and count requests and tokens a second of CPU time."""
    kinds = ((512, 1), (512, 64), (16, 1), (16, 64))
    runs = tuple(simulate(requests, block_tokens, most_ticks) for block_tokens, most_ticks in kinds)
    command.show(Report(machine(), runs), as_json, _print)


def simulate(requests: int, block_tokens: int, most_ticks: int) -> Run:
    """Prompts of 2,000 to 20,000 tokens, the first half of each shared with others, and answers of 100 to 600."""
    source, scheduler = random.Random(1), Scheduler(_profile(block_tokens))
    now_s, next_s, came, done, steps, tokens = 0.0, 0.0, 0, 0, 0, 0
    began_s = time.process_time()
    while done < requests:
        while came < requests and next_s <= now_s:
            request = _draw(source, came, block_tokens)
            scheduler.add(request, now_s)
            came, next_s, tokens = came + 1, next_s + source.expovariate(_RATE_PER_S), tokens + request.max_tokens
        step = scheduler.plan(now_s, most_ticks)
        if step is None:
            now_s = next_s
            continue
        if came < requests and next_s < now_s + step.seconds:
            scheduler.shorten(step, next_s)
        now_s, steps = step.started_s + step.seconds, steps + 1
        done += sum(kind is EventKind.FINISHED for kind, _ in scheduler.finish(step, now_s))
        scheduler.drain_cache_events()
    cpu_s = time.process_time() - began_s
    return Run(block_tokens, most_ticks, requests, steps, now_s, cpu_s, requests / cpu_s, tokens / cpu_s)


def _draw(source: random.Random, number: int, block_tokens: int) -> Request:
    prompt, answer = source.randrange(2000, 20000), source.randrange(100, 600)
    family, shared = source.randrange(_FAMILIES), prompt // block_tokens // 2
    keys = [family << 32 | at for at in range(shared)]
    keys += [number + _FAMILIES << 32 | at for at in range(shared, (prompt + answer) // block_tokens)]
    return Request(str(number), prompt, answer, keys)


def _profile(block_tokens: int) -> Profile:
    """Of no machine: round numbers near those of a large model on a GPU."""
    return Profile(
        name="round numbers",
        model="none",
        device="none",
        source="benchmarks.simulated_scheduler",
        measured_on="2026-11-21",
        prefill=(PrefillPoint(512, 0.05), PrefillPoint(8192, 0.9)),
        decode=tuple(
            DecodePoint(batch, context, 0.01 + batch * 1e-4 + context * batch * 1e-9)
            for batch in (1, 64, 256)
            for context in (1024, 8192)
        ),
        block_tokens=block_tokens,
        block_bytes=1000,
        blocks=_CACHE_TOKENS // block_tokens,
        step_tokens=8192,
        max_running=256,
        max_model_len=131072,
        transfer_bytes_per_s=1e9,
        transfer_latency_s=0.0,
    )


def _print(console: Console, result: Report) -> None:
    table = Table(title=f"{result.runs[0].requests} requests on one core", title_justify="left")
    for column in ("tokens a block", "ticks a step", "steps", "simulated s", "CPU s", "requests/s", "tokens/s"):
        table.add_column(column, justify="right")
    for run in result.runs:
        cells = (run.block_tokens, run.most_ticks, run.steps, f"{run.simulated_s:.0f}", f"{run.cpu_s:.2f}")
        table.add_row(*map(str, cells), f"{run.requests_per_s:.0f}", f"{run.tokens_per_s:.0f}")
    console.print(table)


if __name__ == "__main__":
    app()
