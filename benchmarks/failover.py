"""A node is killed under a steady load: `python -m benchmarks.failover [--json] [--on ray|local]`.

A Ray cluster of a head and three nodes (`ray.cluster_utils.Cluster`: a raylet and its agents each, all on this
machine), `slipstream up --on ray` with a prefill and a decode worker on each node, simulated engines that keep the
time of one H200 a worker. Requests come evenly; in the middle of them one node ends with all that runs on it. With
`--on local` the workers are processes of this machine, of which a third is killed.

A simulated answer follows from its prompt alone. When all is well again the same prompts are asked once more, of the
cluster that nobody disturbs: each answer has to be the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.arrivals import Arrival, Driven, drive
from benchmarks.command import Say
from benchmarks.failover_clusters import LOCAL, NODES, RAY, Failing, cluster
from benchmarks.failover_windows import Recovery, Windows, recovery, windows
from benchmarks.load import Answer, LoadClient, Question
from benchmarks.prompts import Prompts, word_ids
from benchmarks.report import Machine, Target, at_most, equals, machine, targets_table
from benchmarks.server import Server
from slipstream import model_folder
from slipstream.errors import SlipstreamError
from slipstream.settings import DEFAULT_MODEL
from slipstream.v1.registry_pb2 import WorkerRecord

_RUN_TIMEOUT_S = 1200.0
_ANSWER_TIMEOUT_S = 120.0
_CALM_CLIENTS = 12
_METRICS_TIMEOUT_S = 10.0
_WATCH_S = 0.2
NORMAL_WITHIN_S = 30.0
_NONE_FAILED = "no failed request"
_NORMAL = "p99 back to normal within 30 s"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """The load. Its first `settle_s` are not looked at."""

    on: str
    nodes: int
    workers_a_node: int
    profile: str
    rate_per_s: float
    prompt_tokens: int
    max_tokens: int
    settle_s: float
    before_s: float
    after_s: float

    @property
    def kill_at_s(self) -> float:
        return self.settle_s + self.before_s

    @property
    def requests(self) -> int:
        return int((self.kill_at_s + self.after_s) * self.rate_per_s)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the loss of a node did.

    Attributes:
        resumed: answers that went on from another worker; `moved` counts also those that had not begun.
        recomputed_tokens: of all accounts.
        wrong: answers that are not what the undisturbed cluster says.
        cut: answers without as many tokens as were asked for.
        migrations: by what a worker did and how far the request was, as the frontend counted.
        longest_gap_ms: between two tokens of an answer that was moved.
        replaced_s: from the loss until as many workers of each role are ready as before; None: never.
        late_ms: the longest that a request was sent after its time: the client was too slow then.
        others_cores: that other processes of the machine used.
    """

    requests: int
    failed: int
    failures: tuple[str, ...]
    lost_workers: tuple[str, ...]
    moved: int
    resumed: int
    recomputed_tokens: int
    wrong: int
    cut: int
    migrations: dict[str, int]
    longest_gap_ms: float
    replaced_s: float | None
    late_ms: float
    others_cores: float


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    plan: Plan
    outcome: Outcome
    ttft: Recovery
    itl: Recovery
    windows: Windows
    targets: tuple[Target, ...]


@app.command()
def failover(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    on: Annotated[str, typer.Option("--on", help=f"{RAY} or {LOCAL}.")] = RAY,
    rate_per_s: Annotated[float, typer.Option("--rate", help="Requests a second.")] = 6.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=16)] = 128,
    before_s: Annotated[float, typer.Option("--before", help="Seconds of steady load before the loss.")] = 20.0,
    after_s: Annotated[float, typer.Option("--after", help="And after it.")] = 45.0,
) -> None:
    """Kill one node of three under a steady load. Takes three minutes."""
    if on not in (RAY, LOCAL):
        raise typer.BadParameter(f"{on!r} is neither {RAY} nor {LOCAL}", param_hint="--on")
    plan = Plan(on, NODES, 2, "qwen3-32b-h200-tp1", rate_per_s, 1000, max_tokens, 8.0, before_s, after_s)
    facts = machine()
    result = command.run(lambda folder, say: _run(facts, plan, folder, say), _RUN_TIMEOUT_S)
    command.show(result, as_json, _print)


async def _run(facts: Machine, plan: Plan, folder: Path, say: Say) -> Report:
    words = word_ids(model_folder.resolve(DEFAULT_MODEL, weights=False).path)
    prompts = Prompts(words, seed=1)
    arrivals = [Arrival(number / plan.rate_per_s, prompts.draw(plan.prompt_tokens)) for number in range(plan.requests)]
    async with cluster(plan.on, folder, plan.workers_a_node, plan.profile) as failing:
        server = failing.server
        workers = 2 * plan.workers_a_node * plan.nodes
        say(f"{workers} workers on {plan.nodes} nodes ({plan.on}) after {server.start_s:.0f} s")
        async with LoadClient(server.url, server.model, timeout_s=_ANSWER_TIMEOUT_S) as client:
            async with asyncio.TaskGroup() as group:
                driving = group.create_task(drive(server, client, arrivals, plan.max_tokens))
                losing = group.create_task(_lose_a_node(failing, plan, say))
            driven, loss = driving.result(), losing.result()
            migrations = await migrations_of(server)
            say(f"{len(driven.failures)} failed; the same prompts again, undisturbed")
            calm = await _calm(client, arrivals, plan.max_tokens)
    return report(facts, plan, driven, calm, loss, migrations)


@dataclass(frozen=True, slots=True)
class Loss:
    """When a node was lost, with which workers, and how long it took to replace them."""

    at_s: float
    workers: tuple[str, ...]
    replaced_s: float | None


async def _lose_a_node(failing: Failing, plan: Plan, say: Say) -> Loss:
    await asyncio.sleep(plan.kill_at_s)
    before = await failing.workers()
    at_s = time.monotonic()
    lost = await asyncio.to_thread(failing.kill, before)
    say(f"killed a node with {', '.join(lost)}")
    while time.monotonic() < at_s + plan.after_s:
        if whole(before, await failing.workers(), lost):
            replaced_s = time.monotonic() - at_s
            say(f"replaced after {replaced_s:.1f} s")
            return Loss(at_s, tuple(lost), replaced_s)
        await asyncio.sleep(_WATCH_S)
    return Loss(at_s, tuple(lost), None)


def whole(before: Sequence[WorkerRecord], now: Sequence[WorkerRecord], lost: Sequence[str]) -> bool:
    """Whether there are as many workers of each role as before, not counting incarnations that were lost."""
    dead = {(one.worker_id, one.epoch) for one in before if one.worker_id in lost}
    alive = [one.role for one in now if (one.worker_id, one.epoch) not in dead]
    wanted = [one.role for one in before]
    return all(alive.count(role) >= wanted.count(role) for role in set(wanted))


async def _calm(client: LoadClient, arrivals: Sequence[Arrival], max_tokens: int) -> list[str]:
    """What each prompt is answered when nothing happens; empty for an answer that failed."""
    texts, limit = [""] * len(arrivals), asyncio.Semaphore(_CALM_CLIENTS)

    async def one(place: int, arrival: Arrival) -> None:
        async with limit:
            try:
                texts[place] = (await client.ask(Question(arrival.token_ids, max_tokens))).text
            except SlipstreamError:
                return

    async with asyncio.TaskGroup() as group:
        for place, arrival in enumerate(arrivals):
            group.create_task(one(place, arrival))
    return texts


async def migrations_of(server: Server) -> dict[str, int]:
    """Those that the frontend has counted, by reason and stage; without what is 0."""
    async with httpx.AsyncClient(trust_env=False) as client:
        page = (await client.get(f"{server.url}/metrics", timeout=_METRICS_TIMEOUT_S)).text
    return {
        f"{sample.labels['reason']} in {sample.labels['stage']}": int(sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "slipstream_migrations_total" and sample.value
    }


def report(
    facts: Machine, plan: Plan, driven: Driven, calm: Sequence[str], loss: Loss, migrations: dict[str, int]
) -> Report:
    """From what was seen."""
    answers = [one for one in driven.answers if one is not None]
    accounts = [account for one in answers if (account := one.account)]
    moved = [one for one in answers if _migrations(one)]
    gaps = [max(one.gaps_s, default=0.0) for one in moved]
    seen = windows(answers, loss.at_s)
    first, last = -int(plan.before_s), int(plan.after_s) - 2
    ttft, itl = recovery(seen.ttft_p99_ms, first, last), recovery(seen.itl_p99_ms, first, last)
    outcome = Outcome(
        requests=len(driven.answers),
        failed=len(driven.failures),
        failures=driven.failures[:10],
        lost_workers=loss.workers,
        moved=len(moved),
        resumed=sum(1 for one in accounts if one.get("recomputed_tokens")),
        recomputed_tokens=sum(int(one.get("recomputed_tokens", 0)) for one in accounts),
        wrong=sum(1 for one, text in zip(driven.answers, calm, strict=True) if one is not None and one.text != text),
        cut=sum(1 for one in answers if one.completion_tokens != plan.max_tokens),
        migrations=migrations,
        longest_gap_ms=round(max(gaps, default=0.0) * 1e3, 1),
        replaced_s=None if loss.replaced_s is None else round(loss.replaced_s, 2),
        late_ms=round(driven.late_s * 1e3, 1),
        others_cores=round(driven.cpu.others_s / driven.cpu.wall_s, 2),
    )
    return Report(facts, plan, outcome, ttft, itl, seen, targets(outcome, ttft, itl))


def targets(outcome: Outcome, ttft: Recovery, itl: Recovery) -> tuple[Target, ...]:
    return (
        equals("failed requests", outcome.failed, 0, _NONE_FAILED),
        equals("answers with wrong or missing tokens", outcome.wrong + outcome.cut, 0, _NONE_FAILED),
        at_most("seconds until the TTFT's p99 is back", ttft.back_s, NORMAL_WITHIN_S, _NORMAL),
        at_most("seconds until the ITL's p99 is back", itl.back_s, NORMAL_WITHIN_S, _NORMAL),
    )


def _migrations(answer: Answer) -> int:
    account: dict[str, Any] = answer.account or {}
    return int(account.get("migrations", 0))


def _print(console: Console, result: Report) -> None:
    plan, outcome = result.plan, result.outcome
    console.print(
        f"{plan.nodes} nodes ({plan.on}), {outcome.requests} requests at {plan.rate_per_s:g}/s; "
        f"{len(outcome.lost_workers)} workers lost, replaced after {outcome.replaced_s} s; {outcome.moved} requests "
        f"moved, {outcome.resumed} of them in the middle of their answer; longest gap {outcome.longest_gap_ms:.0f} ms; "
        f"{outcome.failed} failed, {outcome.wrong} wrong, {outcome.cut} cut"
    )
    table = Table("", "median p99 before", "normal up to", "worst p99 after", "back after")
    for name, one in (("TTFT", result.ttft), ("ITL", result.itl)):
        back = "never" if one.back_s is None else f"{one.back_s:.0f} s"
        cells = (f"{one.before_median_ms:.1f} ms", f"{one.limit_ms:.1f} ms", f"{one.worst_ms:.1f} ms")
        table.add_row(name, *cells, back)
    console.print(table)
    console.print(targets_table(result.targets))
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores, {result.machine.date}")


if __name__ == "__main__":
    app()
