"""Published results, replayed in simulation on the same setting: `python -m benchmarks.published [--json] [--row 2]`.

Our numbers beside the published ones, with what differs: nobody's GPUs, engine or exact load are here, so that what is
compared is shapes and ratios. Where the workload is not published (rows 7 and 8) there are ranges and no match. The
loads and settings are in `benchmarks.published_routing`, `published_planning` and `published_sweeps`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks import published_planning as planning
from benchmarks import published_routing as routing
from benchmarks import published_sweeps as sweeps
from benchmarks.command import Say
from benchmarks.planner_runs import OURS, split_named
from benchmarks.report import Machine, Target, at_least, at_most, machine, targets_table
from planner.scaling import Counts

T = TypeVar("T")
_RUN_TIMEOUT_S = 7200.0

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Fact:
    """One number beside the published one, where there is one."""

    what: str
    ours: float
    published: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table. `differs`: of the setting, what is not the published one's. `note`: what came out."""

    number: int
    what: str
    differs: str
    facts: tuple[Fact, ...]
    targets: tuple[Target, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    rows: tuple[Row, ...]
    targets: tuple[Target, ...] = field(default=())


class Runner:
    """Calls functions of this package in other processes, as many at once as there are."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    async def __call__(self, function: Callable[..., T], *arguments: object, **named: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, _call, function, arguments, named)


def _call(function: Callable[..., T], arguments: tuple[object, ...], named: dict[str, object]) -> T:
    return function(*arguments, **named)


@app.command()
def published(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    row: Annotated[list[int] | None, typer.Option("--row", help="Only this row; may be given again.")] = None,
    processes: Annotated[int, typer.Option("--processes", min=1)] = 1,
) -> None:
    """Replay the published table. Takes some ten minutes of one core."""
    facts = machine()
    wanted = [number for number in ROWS if not row or number in row]
    result = command.run(lambda _logs, say: _run(facts, wanted, processes, say), _RUN_TIMEOUT_S)
    command.show(result, as_json, _print)


async def _run(facts: Machine, wanted: Sequence[int], processes: int, say: Say) -> Report:
    with ProcessPoolExecutor(processes, initializer=os.nice, initargs=(5,)) as pool:
        runner = Runner(pool)
        rows = []
        for number in wanted:
            rows.append(await ROWS[number](runner))
            say(f"row {number}: {rows[-1].note or 'done'}")
    return Report(facts, tuple(rows), tuple(target for one in rows for target in one.targets))


async def _row_1(run: Runner) -> Row:
    rates = list(planning.rates())
    splits = list(planning.STATIC)
    points = await asyncio.gather(*(run(planning.azure_at, rate, counts) for counts in splits for rate in rates))
    curves = {
        counts: {rate: points[place * len(rates) + n].attainment for n, rate in enumerate(rates)}
        for place, counts in enumerate(splits)
    }
    factor, difference = planning.best_factor(curves)
    scaled = [rate * factor for rate in planning.RATES_PER_S]
    runs = [run(planning.azure_at, rate, counts) for counts in splits for rate in scaled]
    runs += [run(planning.azure_at, rate, Counts(5, 3), planned=True) for rate in scaled]
    runs += [run(planning.azure_at, rate, Counts(5, 3), planned=True, admission=True) for rate in scaled]
    found = await asyncio.gather(*runs)
    count = len(scaled)
    groups = [found[n * count : (n + 1) * count] for n in range(4)]
    names = [f"static {counts}" for counts in splits] + ["our planner, no admission", "our planner with its admission"]
    known = [*planning.STATIC.values(), planning.ADAPTIVE, planning.RESCHEDULED]
    facts = [
        Fact(f"{name} at {rate} req/s", one.attainment, value)
        for name, group, values in zip(names, groups, known, strict=True)
        for rate, one, value in zip(planning.RATES_PER_S, group, values, strict=True)
    ]
    targets = [
        at_least(
            f"row 1: planner's attainment minus the adaptive one's at {rate} req/s",
            one.attainment - value,
            0.0,
            "on row 1 our planner's attainment is at or above the adaptive one's at each rate after rescaling",
        )
        for rate, one, value in zip(planning.RATES_PER_S, groups[3], planning.ADAPTIVE, strict=True)
    ]
    return Row(
        1,
        "Llumnix: adaptive P/D on Azure's conversation trace, 8 x Qwen3-32B, TTFT 6 s, TPOT 50 ms: SLO attainment",
        "H20 is made of H200's tables and the data sheets' ratios, fp8 weights; rates are multiplied by "
        f"{factor:.2f}, where the static splits come nearest to the published ones (mean difference {difference:.2f}); "
        f"the trace's first {planning.AZURE_REQUESTS} requests; the adaptive column stands beside our planner's, the "
        "one with rescheduling beside our planner with admission, as it is by default: that is held against the target",
        tuple(facts),
        tuple(targets),
    )


async def _row_2(run: Runner) -> Row:
    found = await asyncio.gather(*(run(routing.routed, name) for name in routing.PUBLISHED_TTFT_S))
    by_name = {one.policy: one for one in found}
    ours = by_name["global cache"].ttft_mean_s
    facts = [Fact(f"mean TTFT, {one.policy}, s", one.ttft_mean_s, one.published_s) for one in found]
    best = routing.PUBLISHED_TTFT_S["global cache"]
    facts += [
        Fact(f"{one.policy} over global cache", one.ttft_mean_s / ours, (one.published_s or 0.0) / best)
        for one in found
    ]
    facts += [Fact(f"hit rate, {one.policy}", one.hit_rate) for one in found]
    value = by_name["load"].ttft_mean_s / ours
    promise = "on row 2 our router's ratio to load balancing is 1.7x or better"
    return Row(
        2,
        "Mooncake: mean TTFT by routing, its conversation trace",
        f"{routing.SPLIT[0]}P{routing.SPLIT[1]}D of {routing.PROFILE}, the trace's first {routing.REQUESTS} requests "
        f"{routing.SPEED:g} times as fast; the published cluster and speed are not given in full",
        tuple(facts),
        (at_least("row 2: mean TTFT of load balancing over ours", value, 1.7, promise),),
        f"{value:.1f}x load balancing",
    )


async def _row_3(run: Runner) -> Row:
    local, everywhere = await run(routing.caches)
    return Row(
        3,
        "Mooncake: global against local caches, ten prefill workers, 3M tokens each, one token of answer",
        f"{routing.PROFILE} and two decode workers; local: routing by load, as without knowledge of caches",
        (
            Fact("hit rate, local", local.hit_rate),
            Fact("hit rate, global", everywhere.hit_rate),
            Fact("hit rate, global over local", everywhere.hit_rate / local.hit_rate, routing.PUBLISHED_HITS),
            Fact("prefill time, global over local", everywhere.prefill_s / local.prefill_s, routing.PUBLISHED_PREFILL),
        ),
    )


async def _row_4(run: Runner) -> Row:
    splits = [Counts(planning.NODES - decode, decode) for decode in planning.NODE_DECODES]
    statics = await asyncio.gather(*(run(planning.mooncake_split, counts) for counts in splits))
    planned = await run(planning.mooncake_split, Counts(8, 8), planned=True)
    best = max(statics, key=lambda one: one.attainment)
    settled = split_named(planned.last) if planned.last else Counts(8, 8)
    found = split_named(best.what)
    off = max(abs(settled.prefill - found.prefill), abs(settled.decode - found.decode))
    return Row(
        4,
        "Mooncake: the split of sixteen nodes, TTFT 10 s, TBT 100 ms",
        f"workers of {planning.NODE_PROFILE}, the trace's first {planning.NODE_REQUESTS} requests "
        f"{planning.NODE_SPEED:g} times as fast; the planner begins with 8P8D",
        (
            *(Fact(f"attainment of {one.what}", one.attainment) for one in statics),
            Fact("attainment of the planner", planned.attainment),
            Fact("prefill workers of the best split", found.prefill, 8),
            Fact("prefill workers the planner ends with", settled.prefill),
            Fact("decode workers the planner ends with", settled.decode),
        ),
        (
            at_most(
                "row 4: workers off the best split",
                off,
                1,
                "on row 4 the planner settles within one worker of the best split",
            ),
        ),
        f"best {best.what}, planner {settled}",
    )


async def _row_6(run: Runner) -> Row:
    mine, theirs = await asyncio.gather(run(planning.sinusoid, OURS), run(planning.sinusoid, "dynamo throughput"))
    promise = "on row 6 goodput is at least 8x the reported one"
    return Row(
        6,
        "Dynamo's planner under 1 to 24 req/s in 900 s, Qwen3-30B-A3B TP2, 8000/1000, TTFT 3 s, ITL 35 ms",
        f"{planning.SINE_PROFILE}, {planning.SINE_WORKERS} workers at most, one period, from 1P1D on, start-up 60 s; "
        "GPUs, their number and the length of the published run are not given; Dynamo's rule runs here as well, "
        "with our router and admission, and with a perfect model of the engine",
        (
            Fact("goodput, req/s", mine.goodput_per_s, planning.SINE_PUBLISHED_PER_S),
            Fact(
                "goodput of Dynamo's throughput rule here, req/s", theirs.goodput_per_s, planning.SINE_PUBLISHED_PER_S
            ),
            Fact("mean TTFT, s", mine.ttft_mean_s, planning.SINE_TTFT_S),
            Fact("mean TTFT of Dynamo's rule here, s", theirs.ttft_mean_s, planning.SINE_TTFT_S),
            Fact("attainment", mine.attainment),
            Fact("attainment of Dynamo's rule here", theirs.attainment),
            Fact("refused", mine.refused),
        ),
        (
            at_least(
                "row 6: goodput over the reported one", mine.goodput_per_s / planning.SINE_PUBLISHED_PER_S, 8.0, promise
            ),
        ),
    )


async def _row_7(run: Runner) -> Row:
    found = await run(sweeps.amazon)
    gains = [one.gain for one in found if one.gain is not None]
    facts = _sweep_facts(found)
    return Row(
        7,
        "Amazon Ads: 12 prefill x 1 GPU and 1 decode x 4 GPU, Qwen2.5-72B: +50% throughput at the same SLA",
        "lengths and limits are not published: prompts of 3000 tokens, TTFT 2 s and ITL 50 ms for 90%; fp8 on H200; "
        "against the best of 16 x TP1 and 4 x TP4 without disaggregation",
        (*facts, Fact("least gain", min(gains, default=0.0), 1.5), Fact("most gain", max(gains, default=0.0), 1.5)),
    )


async def _row_8(run: Runner) -> Row:
    names = ("random", "global cache")
    lot, ours = await asyncio.gather(*(run(routing.routed, name) for name in names))
    found = await run(sweeps.dynamo)
    return Row(
        8,
        "Dynamo: R1-Distill-Llama-70B fp8 on H100; KV routing TTFT 3x, latency 2x; disaggregation +30% and over 2x",
        "limits are not published: TTFT 2 s and ITL 50 ms for 90%; prefill has two GPUs, as the weights leave one no "
        "room; routing is that of row 2, on Mooncake's trace",
        (
            Fact("TTFT, random over KV routing", lot.ttft_mean_s / ours.ttft_mean_s, 3.0),
            Fact("latency, random over KV routing", lot.e2e_mean_s / ours.e2e_mean_s, 2.0),
            *_sweep_facts(found),
        ),
    )


def _sweep_facts(found: Sequence[sweeps.Sweep]) -> list[Fact]:
    published = {"row 7": 1.5, "row 8, one node": 1.3, "row 8, two nodes": 2.0}
    facts = []
    for one in found:
        name = f"{one.input_tokens}/{one.output_tokens}, {one.gpus} GPUs"
        facts.append(Fact(f"{name}: {one.aggregated}, req/s", one.aggregated_per_s))
        facts.append(Fact(f"{name}: {one.disaggregated}, req/s", one.disaggregated_per_s))
        facts.append(Fact(f"{name}: gain", one.gain or 0.0, published[one.what]))
    return facts


ROWS = {1: _row_1, 2: _row_2, 3: _row_3, 4: _row_4, 6: _row_6, 7: _row_7, 8: _row_8}


def _print(console: Console, result: Report) -> None:
    for row in result.rows:
        table = Table(title=f"{row.number}. {row.what}", title_justify="left", caption=row.differs)
        for column in ("what", "here", "published"):
            table.add_column(column, justify="left" if column == "what" else "right", overflow="fold")
        for fact in row.facts:
            table.add_row(fact.what, f"{fact.ours:.3g}", "" if fact.published is None else f"{fact.published:.3g}")
        console.print(table)
    if result.targets:
        console.print(targets_table(result.targets))
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores, {result.machine.date}")


if __name__ == "__main__":
    app()
