"""Overload with real processes: `slipstream up` with simulated or vLLM workers, a frontend, and the load generator.

The simulated engine may run slower than its profile says (`speed`), so that the machine's CPU is not what is measured.
All is told in the engine's time: seconds of the clock times `speed`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from benchmarks.cluster_server import cluster
from benchmarks.command import Say
from benchmarks.goodput import Result, Try, result
from benchmarks.offered_load import LENGTHS, PATIENCE, SOURCES, WAITS, Lengths, Patience, Source
from benchmarks.open_load import Cost, Plan, generate
from benchmarks.overload_report import TIMES, Part, Step, targets
from benchmarks.overload_simulated import KEEPS_UP
from benchmarks.server import Server, tree_cpu_s
from slipstream.settings import DEFAULT_MODEL

_SETTLE_S = 5.0
_GROWS = 1.02
_RAMP_STEP = 1.12
_REALTIME = (Source("acme", "realtime", 1.0),)
_TTFT_SLO_S = 2.0
_AGING_S = 10.0


@dataclass(frozen=True, slots=True)
class RealWorld:
    """A cluster of processes. Lengths of loads are in the engine's time.

    Attributes:
        start_per_s: where the ramp begins, by the engine's time.
        options: more of `slipstream up`.
    """

    name: str
    prefill: int
    decode: int
    speed: float
    lengths: Lengths
    start_per_s: float
    seconds: float = 100.0
    warm_s: float = 40.0
    ramp_s: float = 30.0
    seed: int = 1
    model: str = DEFAULT_MODEL
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Of its logs."""
        return self.name.replace(", ", "-").replace(" ", "-")


SIMULATED = RealWorld(
    "real processes, simulated workers",
    8,
    8,
    0.5,
    LENGTHS,
    8.0,
    options=("--engine", "simulated", "--profile", "llama-3.1-70b-h200-tp1"),
)
VLLM = RealWorld("real processes, vLLM on the CPU", 1, 1, 1.0, Lengths((64, 256), (8, 32)), 0.8)


@dataclass(frozen=True, slots=True)
class Driven:
    """One load, in the engine's time; cores in the clock's."""

    tries: list[Try]
    cost: Cost
    server_cores: float


async def real(world: RealWorld, logs: Path, say: Say) -> Part:
    """Capacity, and all loads, on a cluster that is started for it.

    Raises:
        StartupError: it did not start.
    """
    async with started(world, logs, say) as server:
        most, ramp = await capacity(server, world, say)
        loads, clients, servers, late = [], [], [], []
        for times in TIMES:
            say(f"{world.name}: {times:g} times {most:.2f} requests/s")
            driven = await drive(server, world, times * most, world.seconds, SOURCES, PATIENCE)
            loads.append(scored(driven, times, times * most, world))
            clients.append(driven.cost.cores)
            servers.append(driven.server_cores)
            late.append(driven.cost.late_p99_s)
            await asyncio.sleep(_SETTLE_S)
    return Part(world.name, world.seed, most, ramp, loads, clients, servers, late, targets(world.name, loads))


def scored(driven: Driven, times: float, rate_per_s: float, world: RealWorld) -> Result:
    """What came of a load after its warm-up."""
    return result(driven.tries, times, rate_per_s, world.warm_s, world.seconds)


@asynccontextmanager
async def started(world: RealWorld, logs: Path, say: Say) -> AsyncIterator[Server]:
    """The cluster, with waits for its classes that fit their SLOs."""
    say(f"{world.name}: starting {world.prefill} prefill and {world.decode} decode workers")
    waits = {name: seconds / world.speed for name, seconds in WAITS.items()}
    admission = {**waits, "ttft_slo_s": _TTFT_SLO_S / world.speed, "aging_s": _AGING_S / world.speed}
    settings = {"admission": admission, "simulated": {"speed": world.speed}}
    folder = logs / world.folder
    config = folder.with_suffix(".yaml")
    await asyncio.to_thread(config.write_text, yaml.safe_dump(settings))
    await asyncio.to_thread(folder.mkdir)
    workers = [
        f"{role}-{n}" for role, count in (("prefill", world.prefill), ("decode", world.decode)) for n in range(count)
    ]
    flags = ("--prefill", str(world.prefill), "--decode", str(world.decode), "--config", str(config), *world.options)
    async with cluster(world.model, folder, *flags, workers=workers) as (server, _):
        yield server


async def capacity(server: Server, world: RealWorld, say: Say) -> tuple[float, list[Step]]:
    """Ramp until goodput stops growing, with all requests realtime."""
    steps: list[Step] = []
    rate_per_s, best = world.start_per_s, 0.0
    while True:
        driven = await drive(server, world, rate_per_s, world.ramp_s, _REALTIME, replace(PATIENCE, tries=1))
        one = result(driven.tries, 0.0, rate_per_s, world.ramp_s / 3, world.ramp_s)
        steps.append(Step(rate_per_s, one.goodput_per_s, one.classes[0].ttft_p99_s))
        say(f"{world.name}: {rate_per_s:.2f} requests/s offered, {one.goodput_per_s:.2f} within the SLO")
        if one.goodput_per_s < best * _GROWS and one.classes[0].attainment < KEEPS_UP:
            return best, steps
        best = max(best, min(one.goodput_per_s, rate_per_s))
        rate_per_s *= _RAMP_STEP


async def drive(
    server: Server, world: RealWorld, rate_per_s: float, seconds: float, sources: tuple[Source, ...], patience: Patience
) -> Driven:
    """One load; `rate_per_s` and `seconds` by the engine's time."""
    plan = plan_of(server, world, rate_per_s, seconds, sources, patience)
    tries: list[Try] = []
    cost = Cost(0.0, 0.0, 0.0)
    cpu_s, began_s = tree_cpu_s(server.pid), time.monotonic()
    async with generate(plan) as lines:
        async for line in lines:
            if isinstance(line, Cost):
                cost = line
            else:
                tries.append(in_engine_time(line, world.speed))
    cores = (tree_cpu_s(server.pid) - cpu_s) / (time.monotonic() - began_s)
    return Driven(tries, cost, cores)


def plan_of(
    server: Server, world: RealWorld, rate_per_s: float, seconds: float, sources: tuple[Source, ...], patience: Patience
) -> Plan:
    """For the generator, which knows the clock's time only."""
    where = urlsplit(server.url)
    assert where.hostname is not None
    assert where.port is not None
    return Plan(
        host=where.hostname,
        port=where.port,
        model=server.model,
        rate_per_s=rate_per_s * world.speed,
        seconds=seconds / world.speed,
        seed=world.seed,
        sources=sources,
        lengths=world.lengths,
        patience=patience,
        drain_s=90.0 / world.speed,
    )


def in_engine_time(one: Try, speed: float) -> Try:
    """The same try as the engine's clock has it."""
    return replace(
        one,
        sent_s=one.sent_s * speed,
        ended_s=one.ended_s * speed,
        ttft_s=one.ttft_s * speed,
        itl_s=one.itl_s * speed,
        retry_after_s=one.retry_after_s * speed,
        longest_gap_s=one.longest_gap_s * speed,
    )
