"""One tenant floods a cluster: what another tenant's clients notice, with admission and without.

    python -m benchmarks.admission --json

Two prefill and two decode workers of the simulated engine, which takes as long as the GPUs of its profile do and no
CPU time to speak of. A calm tenant asks for a fifth of what prefill can do, in the class realtime: first alone, then
beside one that asks for ten times as much, as realtime and as batch; then the same with the flood coming to another
frontend, with both coming to one frontend of two processes (`frontend.workers: 2`), each of which has a gate of its
own, and with the gate open (admission.worker_wait_s at its highest), when all queues are the engines'.

Every request comes over a connection of its own, so that the kernel spreads each tenant's over the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.cluster_server import cluster
from benchmarks.command import Say
from benchmarks.load import Question
from benchmarks.report import Machine, Target, below, equals, machine, ratio, targets_table
from benchmarks.samples import Spread, spread
from benchmarks.server import Server, child_environ, running
from deploy.processes import Component
from slipstream.free_ports import free_port
from slipstream.settings import DEFAULT_MODEL

_PROFILE = "llama-3.1-70b-h200-tp1"
_PROMPT_TOKENS = 4096
_PREFILL_S = 0.496
"""The profile's own time for such a prompt."""
_WORKERS = 2
_VOCABULARY = 40000
_FLOOD = 10
_ANSWER_TOKENS = 8
_TIMEOUT_S = 900.0
_REQUEST_TIMEOUT_S = 120.0
_SETTLE_S = 3.0
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 75.0
_POLL_S = 0.1

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Asker:
    """A tenant's load: Poisson arrivals of prompts that nobody has seen."""

    tenant: str
    priority: str
    rate_per_s: float
    seed: int


@dataclass(slots=True)
class Outcome:
    """What a tenant's clients saw.

    Attributes:
        statuses: HTTP statuses, and `left` for clients still waiting at the end.
        retry_after_s: what those refused were told.
        longest_gap_s: between two tokens of one answer; a preempted one pauses.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)
    longest_gap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One load on the cluster: the calm tenant's times, and what became of the flood."""

    name: str
    calm: Spread | None
    calm_statuses: dict[str, int]
    flood: Spread | None
    flood_statuses: dict[str, int]
    retry_after_max_s: float | None
    longest_gap_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """All phases."""

    machine: Machine
    seconds: float
    phases: list[Phase]
    targets: list[Target]
    comparisons: list[Target]


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=5, max=600, help="length of each phase")] = 40.0,
    json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """Measure one tenant's time to first token beside another's flood."""
    facts = machine()
    report = command.run(lambda logs, say: _measure(seconds, facts, logs, say), _TIMEOUT_S + 5 * seconds)
    command.show(report, json, _print)


async def _measure(seconds: float, facts: Machine, logs: Path, say: Say) -> Report:
    calm = Asker("calm", "realtime", 0.2 * _WORKERS / _PREFILL_S, 1)
    flood = Asker("flood", "realtime", _FLOOD * calm.rate_per_s, 2)
    batch = Asker("flood", "batch", flood.rate_per_s, 3)
    phases = []
    async with _cluster(logs / "gated", say) as server:
        for name, askers in (("quiet", [calm]), ("flood", [calm, flood]), ("flood of batch", [calm, batch])):
            phases.append(await _phase(server, name, askers, seconds, say))
        async with _another_frontend(logs / "gated", say) as url:
            phases.append(await _phase(server, "flood at another frontend", [calm, flood], seconds, say, flood_url=url))
    async with _cluster(logs / "pool", say, "frontend:\n  workers: 2\n") as server:
        phases.append(await _phase(server, "flood, two processes", [calm, flood], seconds, say))
    async with _cluster(logs / "open", say, "admission:\n  worker_wait_s: 60\n") as server:
        phases.append(await _phase(server, "flood, gate open", [calm, flood], seconds, say))
    return Report(facts, seconds, phases, _targets(phases), _comparisons(phases))


def _targets(phases: list[Phase]) -> list[Target]:
    quiet, flood, batch, apart, pool, _ = phases
    return [
        below("calm tenant's TTFT p99, flood / quiet", _p99_ratio(flood, quiet), 2.0, "below twice its quiet value"),
        below("the same, flood of batch / quiet", _p99_ratio(batch, quiet), 2.0, "below twice its quiet value"),
        below(
            "the same, flood at another frontend / quiet", _p99_ratio(apart, quiet), 2.0, "below twice its quiet value"
        ),
        below("the same, flood, two processes / quiet", _p99_ratio(pool, quiet), 2.0, "below twice its quiet value"),
        equals(
            "calm requests not answered",
            float(sum(count for one in phases[:-1] for status, count in one.calm_statuses.items() if status != "200")),
            0.0,
            "none",
        ),
    ]


def _comparisons(phases: list[Phase]) -> list[Target]:
    value = _p99_ratio(phases[-1], phases[0])
    return [Target("calm tenant's TTFT p99, flood / quiet, gate open", value, "for comparison", met=True)]


def _p99_ratio(one: Phase, other: Phase) -> float | None:
    return ratio(one.calm.p99_ms if one.calm else None, other.calm.p99_ms if other.calm else None)


@asynccontextmanager
async def _cluster(logs: Path, say: Say, settings: str = "") -> AsyncIterator[Server]:
    say("starting a cluster of simulated workers")
    config = logs.with_suffix(".yaml")
    await asyncio.to_thread(config.write_text, settings)
    await asyncio.to_thread(logs.mkdir)
    options = ("--engine", "simulated", "--profile", _PROFILE, "--prefill", str(_WORKERS), "--decode", str(_WORKERS))
    names = [f"{role}-{number}" for role in ("prefill", "decode") for number in range(_WORKERS)]
    async with cluster(DEFAULT_MODEL, logs, *options, "--config", str(config), workers=names) as (server, _):
        yield server


@asynccontextmanager
async def _another_frontend(logs: Path, say: Say) -> AsyncIterator[str]:
    """A second frontend of the cluster whose logs these are; yields its URL."""
    say("starting another frontend")
    settings = yaml.safe_load((logs / "cluster" / "slipstream.yaml").read_text())
    url = f"http://127.0.0.1:{(http_port := free_port())}"
    where = ("--control-plane", settings["control_plane"]["address"], "--model", DEFAULT_MODEL)
    ports = ("--http-port", str(http_port), "--grpc-port", str(free_port()))
    component = Component(
        name="another frontend",
        argv=(sys.executable, "-P", "-m", "slipstream", "frontend", *where, *ports),
        environ=child_environ(os.environ) | {"SLIPSTREAM_FRONTEND__HANDOFF": "always"},
        log_path=logs / "frontend-1.log",
    )

    async def ready() -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health/ready")).status_code == 200:
                        return
                await asyncio.sleep(_POLL_S)

    limits = {"start_timeout_s": _START_TIMEOUT_S, "stop_timeout_s": _STOP_TIMEOUT_S}
    async with running(component, ready, **limits):
        yield url


async def _phase(
    server: Server, name: str, askers: list[Asker], seconds: float, say: Say, *, flood_url: str = ""
) -> Phase:
    outcomes = {asker.tenant: Outcome() for asker in askers}
    say(f"{name}: {', '.join(f'{one.tenant} {one.rate_per_s:.1f}/s as {one.priority}' for one in askers)}")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=_REQUEST_TIMEOUT_S, limits=limits) as client,
        httpx.AsyncClient(base_url=flood_url or server.url, timeout=_REQUEST_TIMEOUT_S, limits=limits) as flooding,
        asyncio.TaskGroup() as loads,
    ):
        for asker in askers:
            prompts = random.Random(f"{name} {asker.tenant}")
            own = client if asker.tenant == "calm" else flooding
            loads.create_task(_load(own, server.model, asker, outcomes[asker.tenant], seconds, prompts))
    await asyncio.sleep(_SETTLE_S)
    calm, flood = outcomes["calm"], outcomes.get("flood", Outcome())
    return Phase(
        name=name,
        calm=spread(calm.ttft_s),
        calm_statuses=dict(calm.statuses),
        flood=spread(flood.ttft_s),
        flood_statuses=dict(flood.statuses),
        retry_after_max_s=max(flood.retry_after_s, default=None),
        longest_gap_s=round(flood.longest_gap_s, 3),
    )


async def _load(
    client: httpx.AsyncClient, model: str, asker: Asker, outcome: Outcome, seconds: float, prompts: random.Random
) -> None:
    """Requests for so many seconds. The calm tenant's clients wait for their answers, the others hang up at the end.

    The times are the asker's own in every phase, the prompts new ones.
    """
    chance, began_s, at_s = random.Random(asker.seed), time.monotonic(), 0.0
    async with asyncio.TaskGroup() as requests:
        open_requests: list[asyncio.Task[None]] = []
        while (at_s := at_s + chance.expovariate(asker.rate_per_s)) < seconds:
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            prompt = [prompts.randrange(100, _VOCABULARY) for _ in range(_PROMPT_TOKENS)]
            open_requests.append(requests.create_task(_ask(client, model, asker, prompt, outcome)))
        await asyncio.sleep(max(0.0, began_s + seconds - time.monotonic()))
        if asker.tenant != "calm":
            for request in open_requests:
                request.cancel()


async def _ask(client: httpx.AsyncClient, model: str, asker: Asker, prompt: list[int], outcome: Outcome) -> None:
    headers = {"x-slipstream-tenant": asker.tenant, "x-slipstream-class": asker.priority}
    body = Question(prompt, _ANSWER_TOKENS).body(model)
    sent_s = last_s = time.monotonic()
    status = "left"
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                outcome.retry_after_s.append(float(response.headers.get("retry-after", "nan")))
            else:
                first = True
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now_s = time.monotonic()
                    if first:
                        outcome.ttft_s.append(now_s - sent_s)
                    else:
                        outcome.longest_gap_s = max(outcome.longest_gap_s, now_s - last_s)
                    first, last_s = False, now_s
            status = str(response.status_code)
    finally:
        outcome.statuses[status] += 1


def _print(console: Console, result: Report) -> None:
    table = Table(title=f"Each for {result.seconds:g} s", title_justify="left")
    for column in ("load", "calm TTFT p50", "p99", "calm answered", "flood TTFT p50", "flood: statuses", "Retry-After"):
        table.add_column(column)
    for one in result.phases:
        calm = (f"{one.calm.p50_ms:.0f} ms", f"{one.calm.p99_ms:.0f} ms") if one.calm else ("-", "-")
        flood = f"{one.flood.p50_ms:.0f} ms" if one.flood else "-"
        retry = f"to {one.retry_after_max_s:g} s" if one.retry_after_max_s else "-"
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(one.flood_statuses.items())) or "-"
        table.add_row(one.name, *calm, str(one.calm_statuses.get("200", 0)), flood, statuses, retry)
    console.print(table)
    console.print(targets_table(result.targets))
    console.print(targets_table(result.comparisons, "Not promised, but worth knowing"))


if __name__ == "__main__":
    app()
