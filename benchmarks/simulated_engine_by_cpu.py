"""The simulated engine beside vLLM by the CPU's clock: `python -m benchmarks.simulated_engine_by_cpu --profile FILE`.

`benchmarks.simulated_engine` compares whole clusters by the wall's clock, and needs a quiet machine for that. This one
does not: one vLLM engine of one thread runs step by step in this process, and time is the CPU time that it has used;
when it is idle, time jumps to the next arrival. The simulated scheduler gets the same requests at the same times, with
a profile of `slipstream profile --threads 1 --cpu-clock`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.arrivals import Arrival
from benchmarks.prompts import word_ids
from benchmarks.report import Machine, Target, at_most, machine, targets_table
from benchmarks.simulated_engine import Plan, draw
from engine import environment
from engine.simulated.request import EventKind, Request
from engine.simulated.scheduler import Scheduler
from slipstream import model_folder
from slipstream.block_keys import extend
from slipstream.performance import Profile, read_profile
from slipstream.settings import DEFAULT_MODEL, Settings
from slipstream.worker_settings import WorkerSettings

_WITHIN = 0.15
_PROMISE = "mean TTFT and ITL within 15%, by the CPU's clock, one aggregated engine"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Means:
    """What one engine did. `busy_s` is the time in its steps."""

    name: str
    ttft_ms: float
    itl_ms: float
    busy_s: float
    steps: int


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    plan: Plan
    profile: Profile
    engines: tuple[Means, ...]
    targets: tuple[Target, ...]


@dataclass(slots=True)
class Seen:
    """When one request's tokens came: the first, and the last so far."""

    arrived_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0

    def token(self, now_s: float, count: int = 1) -> None:
        self.first_s = self.first_s or now_s
        self.last_s = now_s
        self.tokens += count


@app.command()
def simulated_engine_by_cpu(
    profile: Annotated[Path, typer.Option("--profile", help="Made with --threads 1 --cpu-clock.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    requests: Annotated[int, typer.Option("--requests", help="To replay.", min=2)] = Plan().requests,
    rate_per_s: Annotated[float, typer.Option("--rate", help="Requests a second.")] = Plan().rate_per_s,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
) -> None:
    """Compare TTFT and ITL of vLLM's engine and of the simulated one, whatever else the machine does."""
    plan, facts, made = Plan(requests=requests, rate_per_s=rate_per_s), machine(), read_profile(profile)
    folder = model_folder.resolve(model).path
    arrivals = draw(plan, word_ids(folder))
    simulated = simulate(made, arrivals, plan.max_tokens)
    real = _vllm(made, folder, arrivals, plan.max_tokens)
    command.show(Report(facts, plan, made, (real, simulated), _targets(real, simulated)), as_json, _print)


def simulate(profile: Profile, arrivals: Sequence[Arrival], max_tokens: int) -> Means:
    """The scheduler in virtual time."""
    scheduler, seen = Scheduler(profile, record_cache=False), [Seen(one.at_s) for one in arrivals]
    now_s, busy_s, steps, came = 0.0, 0.0, 0, 0
    while True:
        while came < len(arrivals) and arrivals[came].at_s <= now_s:
            tokens = arrivals[came].token_ids
            keys = extend(0, list(tokens), profile.block_tokens)
            scheduler.add(Request(str(came), len(tokens), max_tokens, keys), now_s)
            came += 1
        step = scheduler.plan(now_s)
        if step is None:
            if came == len(arrivals):
                return _means("simulated", seen, busy_s, steps)
            now_s = arrivals[came].at_s
            continue
        now_s, busy_s, steps = now_s + step.seconds, busy_s + step.seconds, steps + 1
        for kind, request in scheduler.finish(step, now_s):
            if kind is EventKind.PROMPT_COMPUTED:
                seen[int(request.request_id)].token(now_s)
            elif kind is EventKind.FINISHED:
                seen[int(request.request_id)].token(now_s, max_tokens - 1)


def _vllm(profile: Profile, folder: Path, arrivals: Sequence[Arrival], max_tokens: int) -> Means:
    """vLLM in this process, in time that runs only while it computes."""
    environment.prepare(Settings(worker=WorkerSettings(threads=1)), os.environ)
    from vllm import SamplingParams

    engine = _engine(profile, folder)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    engine.add_request("warm", {"prompt_token_ids": list(range(100, 500))}, sampling)
    while engine.has_unfinished_requests():
        engine.step()
    seen = [Seen(one.at_s) for one in arrivals]
    skipped_s, busy_s, steps, came = -time.process_time(), 0.0, 0, 0
    while came < len(arrivals) or engine.has_unfinished_requests():
        now_s = time.process_time() + skipped_s
        if not engine.has_unfinished_requests() and arrivals[came].at_s > now_s:
            skipped_s += arrivals[came].at_s - now_s
            now_s = arrivals[came].at_s
        while came < len(arrivals) and arrivals[came].at_s <= now_s:
            engine.add_request(str(came), {"prompt_token_ids": list(arrivals[came].token_ids)}, sampling)
            came += 1
        began_s = time.process_time()
        outputs = engine.step()
        ended_s = time.process_time()
        busy_s, steps = busy_s + ended_s - began_s, steps + 1
        for output in outputs:
            one = seen[int(output.request_id)]
            new = len(output.outputs[0].token_ids) - one.tokens
            if new:
                one.token(ended_s + skipped_s, new)
    return _means("vllm", seen, busy_s, steps)


def _engine(profile: Profile, folder: Path) -> Any:
    """As a worker makes it, with the sizes of the profile."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from engine import device as devices

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(folder),
            dtype=devices.choose_dtype("auto", "cpu", devices.cpu_flags()),
            skip_tokenizer_init=True,
            max_model_len=profile.max_model_len,
            kv_cache_memory_bytes=profile.blocks * profile.block_bytes + profile.block_bytes,
            max_num_seqs=profile.max_running,
            max_num_batched_tokens=profile.step_tokens,
            enforce_eager=True,
            enable_prefix_caching=True,
            generation_config="vllm",
        )
    )


def _means(name: str, seen: Sequence[Seen], busy_s: float, steps: int) -> Means:
    """Over all requests, and over all gaps between tokens."""
    gaps = sum(one.tokens - 1 for one in seen)
    return Means(
        name,
        ttft_ms=sum(one.first_s - one.arrived_s for one in seen) / len(seen) * 1e3,
        itl_ms=sum(one.last_s - one.first_s for one in seen) / gaps * 1e3,
        busy_s=busy_s,
        steps=steps,
    )


def _targets(real: Means, simulated: Means) -> tuple[Target, ...]:
    return (
        at_most("mean TTFT: simulated against vLLM", abs(simulated.ttft_ms / real.ttft_ms - 1), _WITHIN, _PROMISE),
        at_most("mean ITL: simulated against vLLM", abs(simulated.itl_ms / real.itl_ms - 1), _WITHIN, _PROMISE),
    )


def _print(console: Console, result: Report) -> None:
    table = Table(title=f"{result.plan.requests} requests, {result.plan.rate_per_s} a second", title_justify="left")
    for column in ("engine", "TTFT mean", "ITL mean", "busy", "steps"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for one in result.engines:
        table.add_row(one.name, f"{one.ttft_ms:.1f} ms", f"{one.itl_ms:.1f} ms", f"{one.busy_s:.1f} s", str(one.steps))
    console.print(table)
    console.print(targets_table(result.targets))


if __name__ == "__main__":
    app()
