"""The simulated engine beside the real one: `python -m benchmarks.simulated_engine [--json]`.

A profile of this machine is measured, as `slipstream profile` does it, on the cores that one worker of two gets. Then
the same requests at the same times go to one prefill and one decode worker with vLLM, and to two simulated ones with
that profile, all through `slipstream up` and its HTTP face, with every prompt handed over.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from benchmarks.prompts import Prompts, mixed_lengths, word_ids
from benchmarks.report import Machine, Target, at_most, machine, targets_table
from benchmarks.samples import Spread, spread
from deploy import cores
from slipstream import model_folder
from slipstream.errors import StartupError, UnavailableError
from slipstream.performance import Profile, read_profile
from slipstream.settings import DEFAULT_MODEL

_RUN_TIMEOUT_S = 2400.0
_PROFILE_TIMEOUT_S = 900.0
_ANSWER_TIMEOUT_S = 120.0
_WITHIN = 0.15
_PROMISE = "mean TTFT and ITL within 15%"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """The load.

    Attributes:
        lengths: of prompts, in tokens, each as often as the others.
        rate_per_s: of requests, which come as a Poisson process.
        warm: requests before those that count.
    """

    requests: int = 100
    lengths: tuple[int, ...] = (32, 64, 128, 256, 384)
    max_tokens: int = 24
    rate_per_s: float = 0.8
    warm: int = 3
    seed: int = 1


@dataclass(frozen=True, slots=True)
class System:
    """What one cluster did.

    Attributes:
        others_cores: that other processes used meanwhile; the real engine is slower for them, the simulated is not.
    """

    name: str
    ttft: Spread
    itl: Spread
    failed: int
    others_cores: float


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    plan: Plan
    profile: Profile
    systems: tuple[System, ...]
    targets: tuple[Target, ...]


@app.command()
def simulated_engine(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few requests only: shows that all works.")] = False,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Use this one; measured first when absent.", show_default=False)
    ] = None,
    rate_per_s: Annotated[float, typer.Option("--rate", help="Requests a second.")] = Plan().rate_per_s,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
) -> None:
    """Compare TTFT and ITL of vLLM and of the simulated engine under the same load. Takes some minutes."""
    plan = Plan(requests=8, warm=1, rate_per_s=rate_per_s) if quick else Plan(rate_per_s=rate_per_s)
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
    systems = []
    kinds: list[tuple[str, tuple[str, ...]]] = [
        ("vllm", ()),
        ("simulated", ("--engine", "simulated", "--profile", str(profile.absolute()))),
    ]
    for name, flags in kinds:
        say(f"starting {name}")
        where = logs / name
        where.mkdir()
        async with (
            cluster(model, where, *flags) as (server, _),
            LoadClient(server.url, server.model, timeout_s=_ANSWER_TIMEOUT_S) as client,
        ):
            await drive(server, client, draw(plan, word_ids(folder), plan.warm), plan.max_tokens)
            say(f"{name}: {plan.requests} requests")
            systems.append(summary(name, await drive(server, client, arrivals, plan.max_tokens)))
        say(f"{name}: TTFT {systems[-1].ttft.mean_ms:.0f} ms, ITL {systems[-1].itl.mean_ms:.1f} ms")
    return Report(facts, plan, made, tuple(systems), targets(*systems))


def draw(plan: Plan, words: Sequence[int], warm: int = 0) -> list[Arrival]:
    """The requests; with `warm`, so many others."""
    count, seed = (warm, plan.seed + 1) if warm else (plan.requests, plan.seed)
    times, prompts, at_s = random.Random(seed), Prompts(words, seed), 0.0
    arrivals = []
    for tokens in mixed_lengths(plan.lengths, count, seed):
        arrivals.append(Arrival(at_s, prompts.draw(tokens)))
        at_s += times.expovariate(plan.rate_per_s)
    return arrivals


async def measure_profile(model: str, output: Path, log: Path) -> None:
    """Of this machine, on the CPUs that one of two workers gets.

    Raises:
        StartupError: it failed; its last words are in the message.
    """
    shares = cores.divide(cores.physical_cores(os.sched_getaffinity(0)), 2)
    share = shares[0] if shares is not None else tuple(os.sched_getaffinity(0))
    argv = [
        "-P",
        "-m",
        "slipstream",
        "profile",
        "--model",
        model,
        "--threads",
        str(len(share)),
        "--output",
        str(output),
    ]
    with log.open("wb") as words:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *argv,
            stdout=words,
            stderr=asyncio.subprocess.STDOUT,
            preexec_fn=partial(os.sched_setaffinity, 0, share),
        )
        try:
            async with asyncio.timeout(_PROFILE_TIMEOUT_S):
                status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if status:
        said = await asyncio.to_thread(log.read_text, errors="replace")
        raise StartupError(f"`slipstream profile` failed: {said[-2000:]}")


def summary(name: str, driven: Driven) -> System:
    """What a load came to.

    Raises:
        UnavailableError: no request was answered.
    """
    answers = [answer for answer in driven.answers if answer is not None and answer.arrivals_s]
    ttft = spread([answer.ttft_s for answer in answers])
    itl = spread([gap for answer in answers for gap in answer.gaps_s])
    if ttft is None or itl is None:
        raise UnavailableError(f"{name}: no request was answered: {driven.failures[:1]}")
    return System(name, ttft, itl, len(driven.failures), driven.cpu.others_s / max(driven.cpu.wall_s, 1e-9))


def targets(real: System, simulated: System) -> tuple[Target, ...]:
    """By how much the simulated one is off."""
    return (
        at_most("mean TTFT: simulated against vLLM", _off(real.ttft, simulated.ttft), _WITHIN, _PROMISE),
        at_most("mean ITL: simulated against vLLM", _off(real.itl, simulated.itl), _WITHIN, _PROMISE),
    )


def _off(real: Spread, simulated: Spread) -> float:
    return abs(simulated.mean_ms / real.mean_ms - 1)


def _print(console: Console, result: Report) -> None:
    table = Table(title=f"{result.plan.requests} requests, {result.plan.rate_per_s} a second", title_justify="left")
    for column in ("engine", "TTFT mean", "p50", "p99", "ITL mean", "p50", "p99", "failed", "others' cores"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for one in result.systems:
        cells = [f"{value:.1f} ms" for of in (one.ttft, one.itl) for value in (of.mean_ms, of.p50_ms, of.p99_ms)]
        table.add_row(one.name, *cells, str(one.failed), f"{one.others_cores:.2f}")
    console.print(table)
    console.print(targets_table(result.targets))
    busy = statistics.fmean(one.others_cores for one in result.systems)
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores, {result.machine.date}; others used {busy:.2f}")


if __name__ == "__main__":
    app()
