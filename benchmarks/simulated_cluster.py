"""The simulator beside a real cluster: `python -m benchmarks.simulated_cluster [--json]`.

A profile of this machine is measured, on the cores that one worker of two gets, as its speed changes from hour to hour.
Then 200 requests go, at the same times, through a real cluster (`slipstream up`, vLLM on the CPU, one prefill and one
decode worker, every prompt handed over) and through the simulator with that profile. Needs a quiet machine.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.arrivals import Arrival, Driven, drive
from benchmarks.cluster_server import cluster
from benchmarks.command import Say
from benchmarks.load import LoadClient
from benchmarks.prompts import word_ids
from benchmarks.report import Machine, Target, at_most, machine, targets_table
from benchmarks.simulated_engine import Plan, draw, measure_profile
from frontend.router.choice import Router
from simulator import traces
from simulator.serving import fixed_cluster
from slipstream import model_folder
from slipstream.block_keys import extend
from slipstream.errors import UnavailableError
from slipstream.performance import Profile, read_profile
from slipstream.settings import DEFAULT_MODEL

_RUN_TIMEOUT_S = 3600.0
_ANSWER_TIMEOUT_S = 180.0
REQUESTS = 200
WITHIN = 0.15
_PROMISE = "throughput and mean TTFT and ITL within 15%"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class System:
    """What one cluster did.

    Attributes:
        tokens_per_s: of answers, from the first arrival to the last token.
        others_cores: that other processes used meanwhile; the simulated cluster is not slower for them.
    """

    name: str
    tokens_per_s: float
    ttft_mean_ms: float
    itl_mean_ms: float
    failed: int
    others_cores: float


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    plan: Plan
    profile: Profile
    systems: tuple[System, System]
    targets: tuple[Target, ...]


@app.command()
def simulated_cluster(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    requests: Annotated[int, typer.Option("--requests", min=2)] = REQUESTS,
    rate_per_s: Annotated[float, typer.Option("--rate", help="Requests a second.")] = Plan().rate_per_s,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Use this one; measured first when absent.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
) -> None:
    """Compare throughput, TTFT and ITL of a real cluster and of the simulator. Takes about ten minutes."""
    plan = Plan(requests=requests, rate_per_s=rate_per_s)
    facts = machine()
    result = command.run(lambda logs, say: _run(plan, facts, model, profile, logs, say), _RUN_TIMEOUT_S)
    command.show(result, as_json, _print)


async def _run(plan: Plan, facts: Machine, model: str, profile: Path | None, logs: Path, say: Say) -> Report:
    folder = (await asyncio.to_thread(model_folder.resolve, model)).path
    arrivals = draw(plan, word_ids(folder))
    if profile is None:
        profile = logs / "profile.json"
        say("measuring a profile")
        await measure_profile(model, profile, logs / "profile.log")
    made = await asyncio.to_thread(read_profile, profile)
    say("starting the cluster")
    async with (
        cluster(model, logs) as (server, _),
        LoadClient(server.url, server.model, timeout_s=_ANSWER_TIMEOUT_S) as client,
    ):
        await drive(server, client, draw(plan, word_ids(folder), plan.warm), plan.max_tokens)
        say(f"{plan.requests} requests")
        driven = await drive(server, client, arrivals, plan.max_tokens)
    systems = real(driven, arrivals, plan.max_tokens), simulated(made, arrivals, plan.max_tokens)
    return Report(facts, plan, made, systems, targets(*systems))


def real(driven: Driven, arrivals: Sequence[Arrival], max_tokens: int) -> System:
    """What the real cluster did.

    Raises:
        UnavailableError: no request was answered.
    """
    done = [
        (one.at_s, answer)
        for one, answer in zip(arrivals, driven.answers, strict=True)
        if answer is not None and answer.arrivals_s
    ]
    if not done:
        raise UnavailableError(f"no request was answered: {driven.failures[:1]}")
    ended_s = max(at_s + answer.ttft_s + sum(answer.gaps_s) for at_s, answer in done)
    return System(
        "real",
        len(done) * max_tokens / ended_s,
        statistics.fmean(answer.ttft_s for _, answer in done) * 1e3,
        statistics.fmean(gap for _, answer in done for gap in answer.gaps_s) * 1e3,
        len(driven.failures),
        driven.cpu.others_s / max(driven.cpu.wall_s, 1e-9),
    )


def simulated(profile: Profile, arrivals: Sequence[Arrival], max_tokens: int) -> System:
    """The same requests in virtual time; what the profile says of a request's way to and from the engine is added."""
    load = [
        traces.Arrival(
            one.at_s,
            str(number),
            len(one.token_ids),
            max_tokens,
            tuple(extend(0, list(one.token_ids), profile.block_tokens)),
        )
        for number, one in enumerate(arrivals)
    ]
    policy = Router("kv", always_hand_off=True)
    serving, kept = fixed_cluster((profile, profile), (1, 1), [policy])
    serving.run(load)
    done = [one for one in kept.journeys if not one.error]
    return System(
        "simulated",
        len(done) * max_tokens / max(one.ended_s for one in done),
        (statistics.fmean(one.ttft_s for one in done) + profile.overhead_s) * 1e3,
        statistics.fmean(one.tpot_s for one in done) * 1e3,
        len(kept.journeys) - len(done),
        0.0,
    )


def targets(real: System, simulated: System) -> tuple[Target, ...]:
    """By how much the simulated one is off."""
    return tuple(
        at_most(
            f"{name}: simulated against real", abs(getattr(simulated, name) / getattr(real, name) - 1), WITHIN, _PROMISE
        )
        for name in ("tokens_per_s", "ttft_mean_ms", "itl_mean_ms")
    )


def _print(console: Console, result: Report) -> None:
    table = Table(title=f"{result.plan.requests} requests, {result.plan.rate_per_s} a second", title_justify="left")
    for column in ("cluster", "tok/s", "TTFT mean", "ITL mean", "failed", "others' cores"):
        table.add_column(column, justify="left" if column == "cluster" else "right")
    for one in result.systems:
        cells = f"{one.tokens_per_s:.1f}", f"{one.ttft_mean_ms:.1f} ms", f"{one.itl_mean_ms:.1f} ms"
        table.add_row(one.name, *cells, str(one.failed), f"{one.others_cores:.2f}")
    console.print(table)
    console.print(targets_table(result.targets))
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores, {result.machine.date}")


if __name__ == "__main__":
    app()
