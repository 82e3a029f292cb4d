"""`python -m benchmarks.router_index`: the frontend's block index at scale: lookups, memory, events.

Half of the workers prefill, half decode. Conversations of 200 blocks lie on one of each, as requests leave them; all
begin with one of 16 system prompts of 8 to 64 blocks, which in time every worker has. Then prompts are looked up
as the router does it, with the next turn of a conversation, a new one, one that nobody knows, and one of 131,072
tokens, alone and as part of the whole decision. Every size is measured in a process of its own, whose resident memory
before and after gives the bytes a block.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import psutil
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import engine.simulated
from benchmarks.report import Machine, Target, below, machine, targets_table, to_json
from frontend.block_index import BlockIndex
from frontend.owner_places import OwnerPlaces
from frontend.router import Ask, Fleet, Router
from slipstream.performance import read_profile
from slipstream.v1.registry_pb2 import Capacity, Load, Role, TransferEndpoint, WorkerRecord, WorkerState

CHAIN_BLOCKS = 200
LONG_BLOCKS = 8192
SYSTEM_PROMPTS = 16
LOOKUPS = 4000
UPDATES = 3000
SIZES = ((1000, 100_000), (1000, 1_000_000), (1000, 3_000_000), (10, 1_000_000), (100, 1_000_000), (1000, 10_000_000))
"""(workers, blocks)"""

PROFILE = Path(engine.simulated.__file__).parent / "profiles" / "qwen3-32b-h100-tp1.json"
MODEL = "m"
BLOCK_TOKENS = 16
DECISION_TARGET = "Routing decision under 200 microseconds at p99 with 1,000 workers and 10 million indexed blocks"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a duration, in microseconds of the wall clock; `cpu_p99` in those of the thread."""

    p50: float
    p99: float
    worst: float
    cpu_p99: float


@dataclass(frozen=True, slots=True)
class Point:
    """One size.

    Attributes:
        bytes_per_block: resident memory that came with the blocks, by different blocks.
        events_per_s: blocks stored or removed in a second of computing, in updates of 200.
        lookups: by kind of prompt: who has how much of it, as the router's vector.
        decisions: the same and the router's choice of both workers, by predicted time.
        updates: of 4 blocks each, as decoding workers send.
        batches: of 200 blocks each: what a growing table costs the one that meets it.
        tidying: pieces of what a restarted worker leaves to do; its forgetting itself is `forget_us`.
    """

    workers: int
    blocks: int
    owner_sets: int
    bytes_per_block: float
    events_per_s: float
    lookups: dict[str, Spread]
    decisions: dict[str, Spread]
    updates: Spread
    batches: Spread
    tidying: Spread
    forget_us: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured."""

    machine: Machine
    points: list[Point]
    targets: list[Target]


class _Cluster:
    """An index with the blocks of conversations, and the conversations."""

    def __init__(self, workers: int) -> None:
        self.index = BlockIndex()
        self.owners = [self.index.enter() for _ in range(workers)]
        self.random = random.Random(1)
        self._numbers = np.random.default_rng(1)
        self.systems = [self.keys(8 * (1 + number % 8)) for number in range(SYSTEM_PROMPTS)]
        self.conversations: list[NDArray[np.uint64]] = []
        self.batch_s: list[tuple[float, float]] = []

    def grow(self, blocks: int) -> None:
        """Add conversations until there are so many blocks."""
        half = len(self.owners) // 2
        while len(self.index) < blocks:
            system = self.random.choice(self.systems)
            keys = np.concatenate([system, self.keys(CHAIN_BLOCKS - len(system))])
            for owner in (self.random.choice(self.owners[:half]), self.random.choice(self.owners[half:])):
                self.batch_s.append(_timed(partial(self.index.store, owner, keys)))
            if len(self.conversations) < LOOKUPS or self.random.random() < 0.05:
                self.conversations.append(keys)

    def new(self, kind: str) -> list[int]:
        """The keys of one prompt."""
        fresh = self.keys(CHAIN_BLOCKS)
        if kind == "next turn":
            return [*self.random.choice(self.conversations).tolist(), *fresh[:20].tolist()]
        if kind == "new conversation":
            return [*self.random.choice(self.systems).tolist(), *fresh.tolist()]
        if kind == "131,072 tokens":
            return [*self.random.choice(self.conversations).tolist(), *self._long[: LONG_BLOCKS - CHAIN_BLOCKS]]
        return [int(key) for key in fresh]

    @property
    def _long(self) -> list[int]:
        return [int(key) for key in self.keys(LONG_BLOCKS)]

    def keys(self, count: int) -> NDArray[np.uint64]:
        """Of so many blocks that nobody has."""
        return self._numbers.integers(1, 2**64, count, dtype=np.uint64)


def measure(workers: int, blocks: int) -> Point:
    """One size, in this process."""
    resident = psutil.Process().memory_info().rss
    cluster = _Cluster(workers)
    index = cluster.index
    cluster.grow(blocks)
    count = len(index)
    kept = sum(keys.nbytes for keys in cluster.conversations) + 150 * len(cluster.batch_s)
    per_block = (psutil.Process().memory_info().rss - resident - kept) / count
    fleet = _fleet(workers)
    places = OwnerPlaces(np.array([fleet.places()[_name(number)] for number in range(workers)]))
    router = Router("kv")
    kinds = ("next turn", "new conversation", "nobody knows it", "131,072 tokens")
    lookups, decisions = {}, {}

    def look_up(keys: Sequence[int]) -> None:
        index.match(keys).spread(workers, places)

    def decide(keys: Sequence[int]) -> None:
        known = index.match(keys).spread(workers, places).times(BLOCK_TOKENS)
        ask = Ask(MODEL, BLOCK_TOKENS * len(keys) + 1, 500, known_by_slot=known, expected_tokens=300.0)
        router.choose(ask, fleet, 100.0)

    for kind in kinds:
        prompts = [cluster.new(kind) for _ in range(LOOKUPS if "tokens" not in kind else 300)]
        lookups[kind] = _spread([_timed(partial(look_up, keys)) for keys in prompts])
        decisions[kind] = _spread([_timed(partial(decide, keys)) for keys in prompts])
    updates = [_timed(partial(index.store, cluster.owners[0], cluster.keys(4))) for _ in range(UPDATES)]
    batches = cluster.batch_s
    forget_s, _ = _timed(lambda: index.leave(cluster.owners[1]))
    tidying = [_timed(index.tidy)]
    while index.tidy():
        tidying.append(_timed(index.tidy))
    return Point(
        workers=workers,
        blocks=count,
        owner_sets=index.owner_sets,
        bytes_per_block=per_block,
        events_per_s=CHAIN_BLOCKS * len(batches) / sum(cpu for _, cpu in batches),
        lookups=lookups,
        decisions=decisions,
        updates=_spread(updates),
        batches=_spread(batches),
        tidying=_spread(tidying),
        forget_us=forget_s * 1e6,
    )


def _name(number: int) -> str:
    return f"w{number}"


def _fleet(workers: int) -> Fleet:
    """The workers of the index as the router knows them, eight a host, busy to different degrees."""
    fleet, rng = Fleet("benchmark"), random.Random(2)
    profile = read_profile(PROFILE)
    for number in range(workers):
        record = WorkerRecord(
            worker_id=_name(number),
            role=Role.ROLE_PREFILL if number < workers // 2 else Role.ROLE_DECODE,
            state=WorkerState.READY,
            model=MODEL,
            host_id=f"host-{rng.randrange(max(1, workers // 8))}",
            epoch=1,
            capacity=Capacity(
                max_model_len=200_000,
                block_tokens=BLOCK_TOKENS,
                blocks=profile.blocks,
                block_bytes=profile.block_bytes,
                max_running=profile.max_running,
            ),
            transfer=TransferEndpoint(address=f"10.0.0.1:{number}", epoch=1, transports=["shm", "ucx"]),
        )
        fleet.put(record)
        fleet.note_profile(record.worker_id, profile)
        running = rng.randrange(30)
        busy = Load(running=running, waiting_tokens=rng.choice((0, 0, 3000, 20_000)), context_tokens=3000 * running)
        fleet.note_load(record.worker_id, busy, Load(), 0.0)
    return fleet


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall clock, and of this thread."""
    began_s, began_cpu_s = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - began_s, time.thread_time() - began_cpu_s


def _spread(times: list[tuple[float, float]]) -> Spread:
    wall, cpu = np.array(times).T * 1e6
    return Spread(
        float(np.median(wall)), float(np.quantile(wall, 0.99)), float(wall.max()), float(np.quantile(cpu, 0.99))
    )


@app.command()
def main(
    json_: bool = typer.Option(False, "--json", help="print the report as JSON"),
    plot: Path | None = typer.Option(None, help="write the growth as an SVG to this file"),  # noqa: B008 - typer's way
    workers: int = typer.Option(0, help="measure this size alone, in this process"),
    blocks: int = typer.Option(0, help="measure this size alone, in this process"),
) -> None:
    """Measure the block index."""
    if workers:
        typer.echo(to_json(measure(workers, blocks)))
        return
    console = Console(stderr=True)
    here = machine()
    points = []
    for size in SIZES:
        console.print(f"{size[0]:,} workers, {size[1]:,} blocks ...")
        points.append(_in_own_process(*size))
    largest = points[-1]
    worst = max(one.cpu_p99 for one in largest.lookups.values())
    slowest = max(one.cpu_p99 for one in largest.decisions.values())
    targets = [
        below(
            "lookup with 1,000 workers and 10 million blocks, the worst kind of prompt, p99, microseconds of computing",
            worst,
            200.0,
            f"{DECISION_TARGET} (this part of it)",
        ),
        below(
            "whole decision with 1,000 workers and 10 million blocks, the worst kind of prompt, p99, microseconds of "
            "computing",
            slowest,
            200.0,
            DECISION_TARGET,
        ),
        below("index memory, bytes a block", largest.bytes_per_block, 100.0, "index memory under 100 bytes a block"),
    ]
    report = Report(here, points, targets)
    if plot is not None:
        _plot(points, plot)
    if json_:
        typer.echo(to_json(report))
    else:
        _print(Console(), report)


def _in_own_process(workers: int, blocks: int) -> Point:
    command = [sys.executable, "-m", "benchmarks.router_index", "--workers", str(workers), "--blocks", str(blocks)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600).stdout
    return msgspec.convert(json.loads(output), Point)


def _print(console: Console, report: Report) -> None:
    table = Table(title="Microseconds (p50 / p99 of computing); whole decisions", title_justify="left")
    kinds = report.points[0].decisions
    for column in ("workers", "blocks", *kinds, "lookup alone", "update of 4", "bytes a block", "events/s"):
        table.add_column(column, justify="right")
    for point in report.points:
        spreads = [*point.decisions.values(), point.lookups["next turn"], point.updates]
        cells = [f"{one.p50:.0f} / {one.cpu_p99:.0f}" for one in spreads]
        table.add_row(
            f"{point.workers:,}",
            f"{point.blocks:,}",
            *cells,
            f"{point.bytes_per_block:.0f}",
            f"{point.events_per_s:,.0f}",
        )
    console.print(table)
    console.print(targets_table(report.targets))
    console.print(f"{report.machine.cpu}, {report.machine.cores} cores, load {report.machine.load_1m}")


def _plot(points: list[Point], path: Path) -> None:
    from matplotlib import pyplot as plt  # a development dependency

    plt.rcParams["svg.fonttype"] = "none"
    figure, (by_blocks, by_workers, memory) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    grown = sorted((one for one in points if one.workers == 1000), key=lambda one: one.blocks)
    wide = sorted((one for one in points if 9e5 < one.blocks < 1.1e6), key=lambda one: one.workers)
    for axis, chosen, x in ((by_blocks, grown, "blocks"), (by_workers, wide, "workers")):
        at = [getattr(one, x) for one in chosen]
        for kind in points[0].decisions:
            (line,) = axis.plot(at, [one.decisions[kind].cpu_p99 for one in chosen], marker="o", label=kind)
            lookups = [one.lookups[kind].cpu_p99 for one in chosen]
            axis.plot(at, lookups, marker=".", linestyle=":", color=line.get_color())
        axis.set(xscale="log", xlabel=x, ylabel="microseconds, p99", ylim=(0, None))
    by_blocks.set_title("decision with 1,000 workers (dotted: lookup)", fontsize=9)
    by_workers.set_title("decision with 1 million blocks (dotted: lookup)", fontsize=9)
    by_blocks.legend(fontsize=7)
    memory.plot([one.blocks for one in grown], [one.bytes_per_block for one in grown], marker="o")
    memory.set(xscale="log", xlabel="blocks", ylabel="bytes a block", ylim=(0, 100))
    memory.set_title("index memory, 1,000 workers", fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    app()
