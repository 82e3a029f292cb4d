"""What a global frontend costs: `python -m benchmarks.global_frontend [--json]`.

Two clusters whose workers take 10 ms a token and no time for a prompt stand behind it. The same load goes to one of the
clusters' frontends directly and through the global frontend to both, in turn: CPU time a request of the processes on
the way, and what the way adds to the time to the first token.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.command import Say
from benchmarks.frontend import words_of
from benchmarks.frontend_comparison import Loaded, Plan, Words, load_of
from benchmarks.frontend_servers import MeasuredFrontend, global_frontend, slipstream_frontend
from benchmarks.report import Machine, machine
from slipstream import model_folder
from slipstream.settings import DEFAULT_MODEL

_RUN_TIMEOUT_S = 900.0
_KEY = "benchmark"
_STEP_S = 0.01  # so that each token is an event of its own

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Round:
    """One load each way, and requests that came one by one each way.

    Attributes:
        through: with the CPU time of the global frontend alone.
        clusters_cpu_ms_per_request: of the clusters' frontends while the load went through.
    """

    direct: Loaded
    through: Loaded
    clusters_cpu_ms_per_request: float
    direct_one_by_one: Loaded
    through_one_by_one: Loaded


@dataclass(frozen=True, slots=True)
class Report:
    """Medians over the rounds; `targets` is empty: nothing was promised but that it is light."""

    plan: Plan
    machine: Machine
    direct_cpu_ms_per_request: float
    global_cpu_ms_per_request: float
    global_cpu_over_direct: float
    events_per_request: float
    added_ttft_p50_ms: float
    rounds: list[Round]
    targets: list[str]


@app.command()
def run(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few requests, one round: shows that all works.")] = False,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
) -> None:
    """Measure the CPU time a request and the added latency of a global frontend."""
    plan = (
        Plan(requests=100, warm_requests=50, latency_requests=10, rounds=1)
        if quick
        else Plan(requests=400, connections=8, latency_requests=50)
    )
    facts = machine()
    command.show(command.run(lambda logs, say: _run(plan, facts, model, logs, say), _RUN_TIMEOUT_S), as_json, _print)


async def _run(plan: Plan, facts: Machine, model: str, logs: Path, say: Say) -> Report:
    folder = (await asyncio.to_thread(model_folder.resolve, model, weights=False)).path
    words = Words(words_of(folder), plan.seed)
    async with AsyncExitStack() as stack:
        clusters = {}
        for name in ("a", "b"):
            where = logs / name
            where.mkdir()
            hashed = sha256(_KEY.encode()).hexdigest()
            started = slipstream_frontend(folder, where, step_s=_STEP_S, queue=4096, peer_key_sha256=hashed)
            clusters[name] = await stack.enter_async_context(started)
        through = await stack.enter_async_context(global_frontend(clusters, _KEY, logs))
        for one in (*clusters.values(), through):
            await load_of(one, plan, words.requests(plan.warm_requests, plan.load_words, plan.max_tokens))
        rounds = []
        for number in range(1, plan.rounds + 1):
            say(f"round {number} of {plan.rounds}")
            rounds.append(await _round(clusters, through, plan, words))
    return _report(plan, facts, rounds)


async def _round(clusters: dict[str, MeasuredFrontend], through: MeasuredFrontend, plan: Plan, words: Words) -> Round:
    def requests(count: int) -> list[bytes]:
        return words.requests(count, plan.load_words, plan.max_tokens)

    both = list(clusters.values())
    direct = await load_of(both[0], plan, requests(plan.requests))
    before_s = sum(one.cpu_s() for one in both)
    passed = await load_of(through, plan, requests(plan.requests))
    behind_ms = (sum(one.cpu_s() for one in both) - before_s) / plan.requests * 1000
    alone = await load_of(both[0], plan, requests(plan.latency_requests), connections=1)
    passed_alone = await load_of(through, plan, requests(plan.latency_requests), connections=1)
    return Round(direct, passed, behind_ms, alone, passed_alone)


def _report(plan: Plan, facts: Machine, rounds: list[Round]) -> Report:
    direct_ms = median(one.direct.cpu_ms_per_request for one in rounds)
    global_ms = median(one.through.cpu_ms_per_request for one in rounds)
    added_ms = median(one.through_one_by_one.ttft_p50_ms - one.direct_one_by_one.ttft_p50_ms for one in rounds)
    events = median(one.through.events_per_request for one in rounds)
    return Report(plan, facts, direct_ms, global_ms, global_ms / direct_ms, events, added_ms, rounds, [])


def _print(console: Console, result: Report) -> None:
    table = Table("CPU ms a request", "events a request", "of what", box=None)
    table.add_row(f"{result.direct_cpu_ms_per_request:.2f}", f"{result.events_per_request:.1f}", "a cluster's frontend")
    table.add_row(f"{result.global_cpu_ms_per_request:.2f}", f"{result.events_per_request:.1f}", "the global frontend")
    console.print(table)
    console.print(f"time to the first token: {result.added_ttft_p50_ms:+.2f} ms (p50, one request at a time)")


if __name__ == "__main__":
    app()
