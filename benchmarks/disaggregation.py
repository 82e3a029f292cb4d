"""`python -m benchmarks.disaggregation`: when prefill workers are worth it, by lengths of prompts and answers.

For each pair of mean lengths and each ITL limit, `simulator.recommend` searches the fewest GPUs that meet the objective
with prefill workers and without, over all tensor parallelisms of a model on a GPU. The rate is the one that keeps so
many GPUs busy by the profile alone: what both ways get is decided before either is looked at.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.command import Say
from benchmarks.report import Machine, Target, machine
from simulator.load_choice import LoadChoice
from simulator.pool_trials import Pool
from simulator.recommend import Recommendation
from simulator.what_if import RecommendAsk, answer_recommend, profiles_of
from slipstream.performance import Predictor

INPUTS = (500, 2000, 8000)
OUTPUTS = (100, 400, 1600)
ITL_LIMITS_S = (0.02, 0.05)
BATCH = 64
"""At which a decode step is reckoned for the rate."""
MAX_GPUS = 64
_TIMEOUT_S = 14400.0

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Setting:
    """`busy_gpus`: that the load keeps busy by the first profile alone, without any waiting."""

    profile: str
    ttft_s: float
    percentile: float
    busy_gpus: float
    hit_rate: float
    requests: int
    itl_limits_s: tuple[float, ...] = ITL_LIMITS_S
    inputs: tuple[int, ...] = INPUTS
    outputs: tuple[int, ...] = OUTPUTS


@dataclass(frozen=True, slots=True)
class Cell:
    """One load and what it needs.

    Attributes:
        gain: requests per second and GPU that the disaggregated pool bears, over those of the aggregated one; None
            where one of both does not meet the objective.
    """

    input_tokens: int
    output_tokens: int
    itl_s: float
    rate_per_s: float
    gain: float | None
    answer: Recommendation


@dataclass(frozen=True, slots=True)
class Report:
    setting: Setting
    machine: Machine
    cells: list[Cell]
    targets: list[Target]


@app.command()
def main(
    as_json: bool = typer.Option(False, "--json", help="print everything as JSON"),
    profile: str = typer.Option("qwen3-32b-h200", help="a model on a GPU: all its packaged profiles are looked at"),
    ttft_s: float = typer.Option(2.0, min=0.001, help="limit of the time to first token"),
    percentile: float = typer.Option(99.0, min=1, max=99.99, help="of requests that keep each limit"),
    busy_gpus: float = typer.Option(6.0, min=0.1, help="size of the load, in GPUs of the smallest worker"),
    hit_rate: float = typer.Option(0.0, min=0, max=0.95, help="of the prompts' tokens"),
    requests: int = typer.Option(1500, min=100, help="of each load"),
    itl_s: list[float] = typer.Option(list(ITL_LIMITS_S), help="limits of the mean time between tokens"),  # noqa: B008
    inputs: list[int] = typer.Option(list(INPUTS), help="mean lengths of prompts"),  # noqa: B008
    outputs: list[int] = typer.Option(list(OUTPUTS), help="mean lengths of answers"),  # noqa: B008
) -> None:
    """Search the smallest pools with and without prefill workers for a grid of lengths."""
    grid = (tuple(itl_s), tuple(inputs), tuple(outputs))
    setting = Setting(profile, ttft_s, percentile, busy_gpus, hit_rate, requests, *grid)
    facts = machine()
    command.show(command.run(lambda logs, say: _measure(setting, facts, say), _TIMEOUT_S), as_json, print_tables)


async def _measure(setting: Setting, facts: Machine, say: Say) -> Report:
    loop = asyncio.get_running_loop()
    grid = product(setting.itl_limits_s, setting.inputs, setting.outputs)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = [loop.run_in_executor(pool, answer, setting, *each) for each in grid]
        for number, task in enumerate(asyncio.as_completed(tasks), start=1):
            cell = await task
            say(f"{number}/{len(tasks)}: {cell.input_tokens}/{cell.output_tokens}: {cell.answer.because}")
        cells = [await task for task in tasks]
    return Report(setting, facts, cells, targets=[])


def answer(setting: Setting, itl_s: float, input_tokens: int, output_tokens: int) -> Cell:
    """One cell."""
    rate_per_s = rate_of(setting, input_tokens, output_tokens)
    load = LoadChoice(
        rate_per_s=rate_per_s,
        input_tokens=float(input_tokens),
        output_tokens=float(output_tokens),
        hit_rate=setting.hit_rate,
        requests=setting.requests,
    )
    told = answer_recommend(
        RecommendAsk(
            load=load,
            profiles=(setting.profile,),
            ttft_s=setting.ttft_s,
            itl_s=itl_s,
            percentile=setting.percentile,
            max_gpus=MAX_GPUS,
        )
    )
    return Cell(input_tokens, output_tokens, itl_s, rate_per_s, _gain(told.disaggregated, told.aggregated), told)


def rate_of(setting: Setting, input_tokens: int, output_tokens: int) -> float:
    """Requests per second whose computation takes `busy_gpus` GPU-seconds a second on the smallest worker."""
    profile = profiles_of((setting.profile,))[0]
    predictor = Predictor(profile)
    prefill_s = predictor.prefill_s(input_tokens * (1 - setting.hit_rate), input_tokens * setting.hit_rate)
    decode_s = output_tokens * predictor.decode_s(BATCH, input_tokens + output_tokens / 2) / BATCH
    return setting.busy_gpus / max(1, profile.gpus) / (prefill_s + decode_s)


def _gain(apart: Pool | None, together: Pool | None) -> float | None:
    if apart is None or together is None or not (apart.meets and together.meets):
        return None
    return (apart.margin / apart.gpus) / (together.margin / together.gpus)


def print_tables(console: Console, report: Report) -> None:
    setting = report.setting
    console.print(
        f"{setting.profile}, TTFT {setting.ttft_s:g} s, {setting.percentile:g}% of requests within each limit, "
        f"hit rate {setting.hit_rate:.0%}, {setting.requests} requests each"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ITL limit", "ISL", "OSL", "req/s"):
        table.add_column(name, justify="right")
    for name in ("with prefill workers", "aggregated", "better", "req/s/GPU, with over without"):
        table.add_column(name)
    for cell in report.cells:
        table.add_row(
            f"{cell.itl_s * 1e3:g} ms",
            str(cell.input_tokens),
            str(cell.output_tokens),
            f"{cell.rate_per_s:.3g}",
            _pool(cell.answer.disaggregated),
            _pool(cell.answer.aggregated),
            cell.answer.better,
            "-" if cell.gain is None else f"{cell.gain:.2f}",
        )
    console.print(table)


def _pool(pool: Pool | None) -> str:
    if pool is None or not pool.meets:
        return "none"
    count = str(pool.counts) if pool.kind == "disaggregated" else str(pool.decode)
    return f"{pool.gpus} GPUs: {count} of TP{pool.tensor_parallel}"


if __name__ == "__main__":
    app()
