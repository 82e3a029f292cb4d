"""Offered load from half to three times the capacity: `python -m benchmarks.overload [--json]`.

Mixed classes and tenants come as a Poisson process, whether or not those before them are answered; who is refused
comes back when Retry-After says. Capacity is measured first: a ramp of realtime requests until goodput stops growing.
In virtual time the live router and admission run over the simulated engines' scheduler, without noise; with real
processes it is `slipstream up` with simulated workers, and with `--vllm` a small one with vLLM too.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import command, overload_report
from benchmarks.command import Say
from benchmarks.goodput import Result
from benchmarks.offered_load import WAITS
from benchmarks.overload_real import SIMULATED, VLLM, real
from benchmarks.overload_report import TIMES, Part, Report, Step, targets
from benchmarks.overload_simulated import World, capacity, replay
from benchmarks.report import machine

_TIMEOUT_S = 3600.0
_START_SHARE = 0.5
"""The ramp begins at so much of what prefill alone could do."""

app = typer.Typer(add_completion=False)


@app.command()
def main(
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
    prefill: Annotated[int, typer.Option(min=1, help="prefill workers")] = 8,
    decode: Annotated[int, typer.Option(min=1, help="decode workers")] = 8,
    seconds: Annotated[float, typer.Option(min=60, help="length of each load in virtual time")] = 300.0,
    seed: Annotated[int, typer.Option(help="of the arrivals")] = 1,
    in_virtual_time: Annotated[
        bool, typer.Option("--virtual/--no-virtual", help="in virtual time, half a minute")
    ] = True,
    with_processes: Annotated[bool, typer.Option("--real/--no-real", help="real processes, half an hour")] = True,
    with_vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="vLLM on the CPU, twenty minutes")] = False,
    speed: Annotated[float, typer.Option(min=0.05, max=4, help="of the simulated workers of real processes")] = 0.5,
    load_s: Annotated[
        float, typer.Option(min=20, help="length of each load on real processes, in engine time")
    ] = 100.0,
) -> None:
    """Goodput, realtime's SLO and Retry-After under overload."""
    facts, world = machine(), World(prefill=prefill, decode=decode, seconds=seconds, seed=seed)
    simulated, vllm = replace(SIMULATED, prefill=prefill, decode=decode), VLLM
    simulated = replace(simulated, start_per_s=_START_SHARE * 2.0 * prefill, speed=speed)
    worlds = [
        replace(one, seconds=load_s, warm_s=0.4 * load_s, ramp_s=0.3 * load_s, seed=seed)
        for one, wanted in ((simulated, with_processes), (vllm, with_vllm))
        if wanted
    ]

    async def measure(logs: Path, say: Say) -> Report:
        parts = [await virtual(world, say)] if in_virtual_time else []
        for one in worlds:
            parts.append(await real(one, logs, say))  # noqa: PERF401 - one after the other
        return Report(facts, WAITS, parts, [one for part in parts for one in part.targets])

    report = command.run(measure, _TIMEOUT_S + 20.0 * load_s * sum(1.0 / one.speed for one in worlds))
    command.show(report, as_json, overload_report.show)


async def virtual(world: World, say: Say) -> Part:
    """All loads in virtual time."""
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        say("virtual time: the capacity")
        most, steps = await loop.run_in_executor(pool, capacity, world, _START_SHARE * 2.0 * world.prefill)
        say(f"virtual time: {most:.2f} requests/s; loads of {', '.join(f'{times:g}' for times in TIMES)} times that")
        tasks = [loop.run_in_executor(pool, replay, world, times * most, times) for times in TIMES]
        loads: list[Result] = list(await asyncio.gather(*tasks))
    how = f"virtual time, {world.prefill}P{world.decode}D of {world.profile}"
    ramp = [Step(one.offered_per_s, one.goodput_per_s, one.classes[0].ttft_p99_s) for one in steps]
    return Part(how, world.seed, most, ramp, loads, [], [], [], targets(how, loads))


if __name__ == "__main__":
    app()
