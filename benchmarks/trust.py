"""Load held, faults survived, bad inputs tried: `python -m benchmarks.trust --json [--minutes 15]`.

Runs, one after the other, each as a command of its own with its seed: the soak, overload in virtual time, the table of
faults, chaos, bad inputs against a live cluster, and the byte fuzzers. The minutes are divided among those that can be
of any length; `--long` runs the hour-long soak, chaos of the promised lengths, all faults and overload with processes,
which takes about four hours. What a command promises is part of the report, in its own words.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.cluster_server import cluster
from benchmarks.command import Say
from benchmarks.report import Machine, Target, at_least, equals, machine, targets_table
from benchmarks.server import child_environ
from slipstream.settings import DEFAULT_MODEL

TARGET = "load held, faults survived, bad inputs tried, each with counts and seeds, nothing lost"
CHAOS = (
    "Chaos for 10 minutes with the tiny model on real vLLM and 60 minutes with simulated engines: zero wrong tokens, "
    "zero leaks, zero hangs; the error rate is within what the table promises"
)
_SLACK_S = 900.0
_STOP_TIMEOUT_S = 90.0
_TAIL_CHARACTERS = 1500
_EXAMPLES = 5
_HARM = ("server_errors", "crashes", "stuck")
_ROOT = Path(__file__).resolve().parent.parent

Counts = dict[str, float | str]
app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is asked of each part; `real` and `all_faults` are those that take long."""

    soak_minutes: float
    chaos_minutes: float
    vllm_chaos_minutes: float
    fuzz_s: float
    bad_inputs: int
    real: bool
    all_faults: bool

    @classmethod
    def within(cls, minutes: float) -> Lengths:
        """Parts of a short run: the faults' selection and overload in virtual time take about five minutes."""
        free = max(1.0, minutes - 5.0)
        return cls(0.35 * free, 0.35 * free, 0.15 * free, 60.0 * 0.1 * free, round(40 * free), False, False)


LONG = Lengths(60.0, 60.0, 10.0, 600.0, 5000, True, True)


@dataclass(frozen=True, slots=True)
class Part:
    """One command.

    Attributes:
        problem: why it has no counts, or "".
        command: how to run it again.
    """

    name: str
    command: str
    seed: int
    took_s: float
    counts: Counts
    targets: list[Target] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    parts: list[Part]
    targets: list[Target]


@dataclass(frozen=True, slots=True)
class _Ended:
    """A command's end: what it reported, and the end of its words."""

    code: int
    report: Any
    words: str


Summary = Callable[[Any], tuple[Counts, list[Target]]]


@app.command()
def main(
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
    minutes: Annotated[float, typer.Option(min=6.0, help="about so long in all")] = 15.0,
    long: Annotated[bool, typer.Option("--long", help="every part at its promised length: about four hours")] = False,
    seed: Annotated[int, typer.Option(help="of every part")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="this part; may be repeated")] = None,
) -> None:
    """Gather what shows that the cluster can be trusted."""
    facts, lengths = machine(), LONG if long else Lengths.within(minutes)
    timeout_s = _SLACK_S + (18000.0 if long else 180.0 * minutes)
    report = command.run(lambda logs, say: _measure(lengths, seed, only or [], facts, logs, say), timeout_s)
    command.show(report, as_json, _print)


async def _measure(lengths: Lengths, seed: int, only: list[str], facts: Machine, logs: Path, say: Say) -> Report:
    parts = []
    for name, run in _parts(lengths, seed, logs).items():
        if not only or name in only:
            say(name)
            parts.append(await run())
    return Report(facts, parts, [one for part in parts for one in part.targets])


def _parts(lengths: Lengths, seed: int, logs: Path) -> Mapping[str, Callable[[], Awaitable[Part]]]:
    soak_minutes = f"{lengths.soak_minutes:.2f}"
    overload = ("benchmarks.overload", "--json", "--seed", str(seed), *(() if lengths.real else ("--no-real",)))
    faults = ("tests.faults.table", "--seed", str(seed), *(() if lengths.all_faults else ("--short",)))

    def chaos(engine: str, minutes: float) -> Callable[[], Awaitable[Part]]:
        name, promised = f"chaos, {engine}", 10.0 if engine == "vllm" else 60.0
        words = ("tests.faults.chaos", "--seed", str(seed), "--minutes", f"{minutes:.2f}", "--engine", engine)
        return lambda: _part(name, words, seed, logs, lambda report: chaos_counts(name, report, promised), to_file=True)

    return {
        "soak": lambda: _part(
            "soak",
            ("benchmarks.soak", "--json", "--minutes", soak_minutes, "--seed", str(seed)),
            seed,
            logs,
            soak_counts,
        ),
        "overload": lambda: _part("overload", overload, seed, logs, overload_counts),
        "faults": lambda: _part("faults", faults, seed, logs, fault_counts, to_file=True),
        "chaos, simulated": chaos("simulated", lengths.chaos_minutes),
        "chaos, vllm": chaos("vllm", lengths.vllm_chaos_minutes),
        "bad inputs": lambda: _bad_inputs(lengths.bad_inputs, seed, logs),
        "fuzz": lambda: _part(
            "fuzz",
            ("tests.fuzz", "--seconds", f"{lengths.fuzz_s:.0f}", "--seed", str(seed)),
            seed,
            logs,
            fuzz_counts,
            to_file=True,
        ),
    }


async def _part(
    name: str, words: tuple[str, ...], seed: int, logs: Path, summary: Summary, *, to_file: bool = False
) -> Part:
    """Run `python -m` with these words; its report is on standard output, or in the file that `--json` names."""
    began_s = time.monotonic()
    ended = await _run(words, logs / f"{name.replace(', ', '-').replace(' ', '-')}.json" if to_file else None)
    told = f"python -m {' '.join(words)}"
    took_s = round(time.monotonic() - began_s, 1)
    if ended.report is None:
        problem = f"it ended with {ended.code} and no report: {ended.words}"
        return Part(name, told, seed, took_s, {}, [equals(f"{name}: was run", None, 1.0, TARGET)], problem)
    counts, targets = summary(ended.report)
    return Part(name, told, seed, took_s, counts, targets)


async def _run(words: tuple[str, ...], file: Path | None) -> _Ended:
    arguments = (*words, "--json", str(file)) if file is not None else words
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environ(os.environ),
        cwd=_ROOT,
    )
    try:
        out, error = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
    if file is not None:
        text = await asyncio.to_thread(file.read_bytes) if await asyncio.to_thread(file.exists) else b""
    else:
        text = out
    report = None
    with contextlib.suppress(msgspec.DecodeError):
        report = msgspec.json.decode(text)
    return _Ended(process.returncode or 0, report, (out[-_TAIL_CHARACTERS:] + error[-_TAIL_CHARACTERS:]).decode())


async def _bad_inputs(cases: int, seed: int, logs: Path) -> Part:
    """Against a cluster of simulated workers that is started for it."""
    folder = logs / "bad-inputs"
    await asyncio.to_thread(folder.mkdir)
    async with cluster(DEFAULT_MODEL, folder, "--engine", "simulated") as (server, _):
        settings = yaml.safe_load(await asyncio.to_thread((folder / "cluster" / "slipstream.yaml").read_text))
        grpc_target = f"127.0.0.1:{settings['frontend']['grpc_port']}"
        words = ("benchmarks.bad_inputs", "--http", server.url, "--grpc", grpc_target, "--model", server.model)
        return await _part(
            "bad inputs",
            (*words, "--seed", str(seed), "--cases", str(cases), "--json"),
            seed,
            logs,
            bad_input_counts,
        )


def soak_counts(report: Any) -> tuple[Counts, list[Target]]:
    """Of `benchmarks.soak`."""
    counts: Counts = {
        "minutes": report["minutes"],
        "capacity_per_s": round(report["capacity_per_s"], 2),
        "offered_per_s": round(report["offered_per_s"], 2),
        "tokens": report["tokens"],
        **report["outcomes"],
    }
    return counts, _targets("soak", report)


def overload_counts(report: Any) -> tuple[Counts, list[Target]]:
    """Of `benchmarks.overload`."""
    counts: Counts = {}
    for part in report["parts"]:
        top = part["loads"][-1]
        how = part["how"]
        counts[f"{how}: capacity"] = round(part["capacity_per_s"], 2)
        counts[f"{how}: goodput at {top['times_capacity']:g}x"] = round(top["goodput_per_s"], 2)
        counts[f"{how}: tries"] = sum(kind["tries"] for load in part["loads"] for kind in load["classes"])
        counts[f"{how}: refused"] = sum(sum(load["refusals"].values()) for load in part["loads"])
        counts[f"{how}: failed"] = sum(load["unanswered"] for load in part["loads"])
    return counts, _targets("overload", report)


def fault_counts(report: Any) -> tuple[Counts, list[Target]]:
    """Of `tests.faults.table`."""
    counts: Counts = dict(report["counts"])
    kept = counts["kept_their_promise"] == counts["cases"] and float(counts["cases"]) > 0
    return counts, [
        Target("faults: cases that kept their promise", float(counts["kept_their_promise"]), TARGET, met=kept),
        *(equals(f"faults: requests {name}", float(counts[name]), 0, TARGET) for name in ("wrong", "untyped", "hung")),
        equals("faults: blocks, leases and requests left held", float(counts["left_held"]), 0, TARGET),
    ]


def chaos_counts(name: str, report: Any, promised_minutes: float) -> tuple[Counts, list[Target]]:
    """Of `tests.faults.chaos`."""
    counts: Counts = {
        "minutes": report["minutes"],
        "rounds": report["rounds"],
        "requests": sum(report["requests"].values()),
        "faults": sum(report["faults"].values()),
        "checks": sum(report["checked"].values()),
        "tokens_compared": report["tokens_compared"],
        "violations": len(report["violations"]),
    }
    counts |= {
        f"violation {number}": f"{one['invariant']}: {one['detail']}"
        for number, one in enumerate(report["violations"][:_EXAMPLES], 1)
    }
    return counts, [
        equals(f"{name}: violations of any invariant", float(counts["violations"]), 0, CHAOS),
        at_least(f"{name}: minutes", float(counts["minutes"]), 0.99 * promised_minutes, CHAOS),
    ]


def bad_input_counts(report: Any) -> tuple[Counts, list[Target]]:
    """Of `benchmarks.bad_inputs`."""
    counts: Counts = {name: value for name, value in report.items() if name not in ("examples", "seed")}
    counts |= {f"example {number}": str(one) for number, one in enumerate(report["examples"][:_EXAMPLES], 1)}
    return counts, [
        at_least("bad inputs: tried", float(counts["tried"]), 1, TARGET),
        *(equals(f"bad inputs: {name}", float(counts[name]), 0, TARGET) for name in _HARM),
    ]


def fuzz_counts(report: Any) -> tuple[Counts, list[Target]]:
    """Of the byte fuzzers."""
    targets = report["targets"]
    counts: Counts = {f"{one['name']}: inputs": one["inputs"] for one in targets}
    return counts, [equals("fuzz: crashes", float(sum(one["crashes"] for one in targets)), 0, TARGET)]


def _targets(name: str, report: Any) -> list[Target]:
    return [Target(f"{name}: {one['name']}", one["value"], one["target"], met=one["met"]) for one in report["targets"]]


def _print(console: Console, report: Report) -> None:
    table = Table(title="What was tried", title_justify="left")
    for column in ("part", "seed", "took", "counts"):
        table.add_column(column, overflow="fold")
    for part in report.parts:
        counts = "; ".join(f"{name} {value}" for name, value in part.counts.items())
        table.add_row(part.name, str(part.seed), f"{part.took_s:.0f} s", part.problem or counts)
    console.print(table)
    console.print(targets_table(report.targets))


if __name__ == "__main__":
    app()
