"""`slipstream planner simulate`: what a policy would do under a load, in virtual time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.load_choice import LoadChoice
from slipstream.cli.load_flags import with_load
from slipstream.cli.planner_calls import moment
from slipstream.cli.show import examples
from slipstream.cli.status import duration

if TYPE_CHECKING:
    from rich.table import Table

    from simulator.outcome import Latencies, Outcome

TRACE = "benchmarks/traces/azure_llm_conv.csv.xz"


def add_to(planner: typer.Typer) -> None:
    planner.command(
        epilog=examples(
            (
                "slipstream planner simulate policy.yaml --rate 5 --input-tokens 3000",
                "a steady load for two minutes or more",
            ),
            (f"slipstream planner simulate policy.yaml --trace {TRACE} --speed 2", "a trace, twice as fast"),
            (
                "slipstream planner simulate policy.yaml --rate 5 --shape daily --duration-s 86400",
                "a day with a peak",
            ),
            ("slipstream planner simulate policy.yaml --rate 5 --workers 2P3D --fixed", "without the planner"),
        ),
    )(simulate)


@with_load
def simulate(
    choice: LoadChoice,
    policy: Annotated[Path, typer.Argument(help="The policy file (YAML).", show_default=False)],
    model: Annotated[str, typer.Option("--model", help="That the load is for; the policy's first when absent.")] = "",
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", metavar="[MODEL=]NAME", help="In place of the policy's: packaged, or a file."),
    ] = None,
    workers: Annotated[
        str, typer.Option("--workers", metavar="2P3D", help="At the beginning; the policy's least when absent.")
    ] = "",
    fixed: Annotated[bool, typer.Option("--fixed", help="The workers stay as they are: nobody plans.")] = False,
    flip_s: Annotated[
        float, typer.Option("--flip-s", min=0, max=3600, help="A worker that changes its role gets nothing so long.")
    ] = 2.0,
    start: Annotated[
        str | None,
        typer.Option(
            "--start", metavar="TIME", help="What the load's beginning is for the policy's schedule; now when absent."
        ),
    ] = None,
    decisions: Annotated[int, typer.Option("--decisions", min=0, help="Decisions to print, the first ones.")] = 20,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a cluster and its planner under a load, in virtual time: a million requests in minutes, on one core."""
    from simulator.what_if import SimulateAsk, answer_simulate
    from slipstream.cli.terminal import messages, output
    from slipstream.yaml_nodes import read_text

    now_s = time.time()
    ask = SimulateAsk(
        policy_yaml=read_text(policy),
        policy_name=str(policy),
        load=choice,
        model=model,
        profiles=_profiles(profile or [], policy, model),
        workers=workers,
        fixed=fixed,
        flip_s=flip_s,
        start_unix_s=now_s if start is None else moment(start, now_s, "--start"),
    )
    with messages().status("simulating") as status:
        outcome = answer_simulate(
            ask, lambda requests, at_s: status.update(f"{requests:,} requests, {duration(at_s)} of the load")
        )
    if json_wanted:
        from simulator.outcome import to_json

        print(to_json(outcome).decode(), end="")  # noqa: T201
        return
    console = output()
    console.print(table(outcome))
    console.print(
        f"\n{duration(outcome.duration_s)}, {outcome.gpu_hours:.2f} GPU-hours, at most {outcome.peak_gpus} GPUs, "
        f"{outcome.good_per_gpu_hour:,.0f} requests in time per GPU-hour; {outcome.actions} actions"
        + (f", {outcome.refused_actions} of them refused" if outcome.refused_actions else "")
    )
    if outcome.decisions and decisions:
        console.print("", decisions_table(outcome, decisions))


def table(outcome: Outcome) -> Table:
    """A row for each model and class, and one for all where there are several."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("model")
    shown.add_column("class")
    for name in ("requests", "refused", "failed", "TTFT p50", "p99", "ITL p50", "p99", "cached", "in time", "goodput"):
        shown.add_column(name, justify="right")
    rows = [*outcome.classes, outcome.all] if len(outcome.classes) > 1 else outcome.classes
    for one in rows:
        shown.add_row(
            Text(one.model or "all"),
            one.service_class,
            f"{one.requests:,}",
            f"{one.refused:,}",
            f"{one.failed:,}",
            *_seconds(one.ttft),
            *_seconds(one.itl),
            f"{one.hit_rate:.0%}",
            f"{one.attainment:.2%}",
            f"{one.goodput_per_s:.2f}/s",
        )
    return shown


def decisions_table(outcome: Outcome, most: int) -> Table:
    """The first decisions that changed something."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("at", "wanted", "done", "because", box=None, pad_edge=False, header_style="bold")
    for one in outcome.decisions[:most]:
        done = "\n".join(
            " ".join(filter(None, (each.kind, each.worker_id or each.role, each.role if each.kind == "flip" else "")))
            + (f" refused: {each.refused}" if each.refused else "")
            for each in one.actions
        )
        wanted = ", ".join(
            counts if len(one.targets) == 1 else f"{name} {counts}" for name, counts in one.targets.items()
        )
        shown.add_row(duration(one.at_s), Text(wanted), Text(done), Text(one.reason))
    if len(outcome.decisions) > most:
        shown.caption = f"{len(outcome.decisions) - most} more; --decisions N or --json shows them."
        shown.caption_justify = "left"
    return shown


def _seconds(latencies: Latencies) -> tuple[str, str]:
    return tuple(f"{one:.2f} s" if one >= 1 else f"{one * 1e3:.1f} ms" for one in (latencies.p50_s, latencies.p99_s))  # type: ignore[return-value]


def _profiles(given: list[str], policy: Path, model: str) -> dict[str, str]:
    """By model; without a model's name for the one that the load is for."""
    from planner.policy_file import read_policy

    chosen = model or read_policy(policy).models[0].model
    pairs = [one.rpartition("=") for one in given]
    return {name or chosen: profile for name, _, profile in pairs}
