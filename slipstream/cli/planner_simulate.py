"""`slipstream planner simulate`: what a policy would do under a load, in virtual time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from simulator.load_choice import LoadChoice
from slipstream.cli.load_flags import with_load
from slipstream.cli.planner_calls import moment
from slipstream.cli.show import examples
from slipstream.cli.status import duration
from slipstream.errors import ConfigError

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
                "slipstream planner simulate policy.yaml --rate 5 --shape daily --duration-s 86400 --html day.html",
                "a day with a peak, and a page with plots",
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
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.", show_default=False)
    ] = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a cluster and its planner under a load, in virtual time: a million requests in minutes, on one core."""
    from simulator import report
    from simulator.chosen_load import about
    from simulator.outcome import to_json
    from simulator.what_if import SimulateAsk, answer_simulate
    from slipstream.cli.terminal import messages, output
    from slipstream.yaml_nodes import read_text

    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"--html: there is no folder {html.absolute().parent}", param="html")
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
    title = f"{policy.name} under {about(choice)}"
    if html is not None:
        html.write_text(report.html(outcome, title), encoding="utf-8")
        messages().print(f"Wrote {html}", soft_wrap=True)
    if json_wanted:
        print(to_json(outcome).decode(), end="")  # noqa: T201
        return
    output().print(report.tables(outcome, title))


def _profiles(given: list[str], policy: Path, model: str) -> dict[str, str]:
    """By model; without a model's name for the one that the load is for."""
    from planner.policy_file import read_policy

    chosen = model or read_policy(policy).models[0].model
    pairs = [one.rpartition("=") for one in given]
    return {name or chosen: profile for name, _, profile in pairs}
