"""Time of one routing decision, block lookup included, by the number of workers and of indexed blocks.

    python -m benchmarks.router_decision --json

By the wall's clock, which is what the target means and says something on a quiet machine only, and in CPU time of the
deciding thread, which is what remains of it when the machine does other things beside. Garbage is collected as in a
frontend's process.
"""

from __future__ import annotations

import random
import resource
import time
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from benchmarks.report import Target, below
from frontend.block_index import BlockIndex
from frontend.owner_places import OwnerPlaces
from frontend.router import Ask, Fleet, Router
from frontend.router.candidate import Share
from slipstream import cycle_collector
from slipstream.v1.registry_pb2 import Capacity, Role, TransferEndpoint, WorkerRecord, WorkerState

LIMIT_US = 200.0
TARGET = "under 200 microseconds at p99 with 1,000 workers and 10 million indexed blocks"
BLOCK_TOKENS = 16
CHAIN_BLOCKS = 190
"""Of each prompt: 3,040 tokens, the first half of which everybody's prompts share."""

WARM_UP = 200
OPEN_REQUESTS = 500


@dataclass(frozen=True, slots=True)
class Row:
    """One size. Times are microseconds: `cpu` of the deciding thread, the others by the wall's clock.

    Attributes:
        undisturbed_p99_us: by the wall's clock, of the decisions during which no other program took the core, which are
            `undisturbed_share` of all; caches that a program before them emptied are in it.
        update_p50_us: what the request changes: it begins on both workers, and an older one ends there.
    """

    workers: int
    blocks: int
    p50_us: float
    p99_us: float
    cpu_p50_us: float
    cpu_p99_us: float
    undisturbed_p99_us: float
    undisturbed_share: float
    lookup_p50_us: float
    choice_p50_us: float
    choice_p99_us: float
    update_p50_us: float


def fleet_of(workers: int) -> Fleet:
    """Half prefill and half decode, eight on a host."""
    fleet = Fleet(tie_break="benchmark")
    for number in range(workers):
        role = Role.ROLE_PREFILL if number % 2 else Role.ROLE_DECODE
        capacity = Capacity(
            max_model_len=131_072, block_tokens=BLOCK_TOKENS, blocks=40_000, block_bytes=4 << 20, max_running=256
        )
        endpoint = TransferEndpoint(address="host:1", epoch=1, transports=["shm", "ucx"])
        fleet.put(
            WorkerRecord(
                worker_id=f"worker-{number}",
                role=role,
                state=WorkerState.READY,
                model="m",
                host_id=f"host-{number // 8}",
                epoch=1,
                capacity=capacity,
                transfer=endpoint,
            )
        )
    return fleet


def index_of(fleet: Fleet, workers: int, blocks: int) -> tuple[BlockIndex, list[list[int]]]:
    """So many blocks, spread evenly, and the chains of which they are; owner numbers are the workers' slots."""
    draw = np.random.default_rng(1)
    index, chains = BlockIndex(), list[list[int]]()
    shared = draw.integers(1, 1 << 63, CHAIN_BLOCKS // 2, dtype=np.uint64)
    for _ in range(workers):
        owner = index.enter()
        own = draw.integers(1, 1 << 63, max(CHAIN_BLOCKS, blocks // workers), dtype=np.uint64)
        index.store(owner, shared)
        index.store(owner, own)
        chains.append([int(key) for key in (*shared, *own[: CHAIN_BLOCKS - len(shared)])])
    while index.tidy():
        pass
    return index, chains


def measure(workers: int, blocks: int, decisions: int) -> Row:
    """Decisions one after the other, each followed by what its request changes."""
    fleet = fleet_of(workers)
    index, chains = index_of(fleet, workers, blocks)
    places = OwnerPlaces(np.arange(workers))  # owners were entered in the order of slots
    router, draw, now_s = Router(), random.Random(1), 0.0
    times, disturbed = list[tuple[int, ...]](), list[bool]()
    cycle_collector.look_seldom()
    open_shares = list[list[Share | None]]()
    for _ in range(decisions + WARM_UP):
        now_s += 0.001
        chain, prompt_tokens = draw.choice(chains), CHAIN_BLOCKS * BLOCK_TOKENS + draw.randrange(1, BLOCK_TOKENS)
        switches = _switches()
        began, began_cpu = time.perf_counter_ns(), time.thread_time_ns()
        known = index.match(chain).spread(fleet.slots, places).times(BLOCK_TOKENS)
        looked_up = time.perf_counter_ns()
        route = router.choose(Ask("m", prompt_tokens, 200, known_by_slot=known), fleet, now_s)
        chosen, chosen_cpu = time.perf_counter_ns(), time.thread_time_ns()
        disturbed.append(_switches() != switches)
        new_tokens = route.new_tokens or 0
        shares = [fleet.begin(route.decode.worker_id, prompt_tokens, 0, now_s)]
        if route.prefill is not None:
            shares.append(fleet.begin(route.prefill.worker_id, prompt_tokens, new_tokens, now_s))
        open_shares.append(shares)
        for share in open_shares.pop(0) if len(open_shares) > OPEN_REQUESTS else ():
            if share is not None:
                share.end(now_s)
        updated = time.perf_counter_ns()
        times.append((looked_up - began, chosen - looked_up, chosen - began, chosen_cpu - began_cpu, updated - chosen))
    lookup, choice, both, cpu, update = np.array(times[WARM_UP:]).T / 1e3
    undisturbed = ~np.array(disturbed[WARM_UP:])
    return Row(
        workers=workers,
        blocks=len(index),
        p50_us=_percentile(both, 50),
        p99_us=_percentile(both, 99),
        cpu_p50_us=_percentile(cpu, 50),
        cpu_p99_us=_percentile(cpu, 99),
        undisturbed_p99_us=_percentile(both[undisturbed], 99),
        undisturbed_share=round(float(undisturbed.mean()), 4),
        lookup_p50_us=_percentile(lookup, 50),
        choice_p50_us=_percentile(choice, 50),
        choice_p99_us=_percentile(choice, 99),
        update_p50_us=_percentile(update, 50),
    )


def _switches() -> int:
    """How often another program took this thread's core."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def _percentile(values: Any, share: float) -> float:
    return round(float(np.percentile(values, share)), 1)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    blocks: Annotated[int, typer.Option(help="Indexed blocks at the largest size.")] = 10_000_000,
    decisions: Annotated[int, typer.Option(help="Decisions measured for each size.")] = 5_000,
) -> None:
    """Measure decisions over 16, 100 and 1,000 workers."""
    rows = [measure(workers, blocks * workers // 1000, decisions) for workers in (16, 100, 1000)]
    targets: list[Target] = [
        below("routing decision p99, wall clock (microseconds)", rows[-1].p99_us, LIMIT_US, TARGET),
        below("routing decision p99, CPU of its thread (microseconds)", rows[-1].cpu_p99_us, LIMIT_US, TARGET),
    ]
    if as_json:
        print(msgspec.json.encode({"targets": targets, "rows": rows}).decode())  # noqa: T201
        return
    for row in rows:
        print(row)  # noqa: T201


if __name__ == "__main__":
    typer.run(main)
