"""`slipstream planner explain` and `history`: what the planner decided, from what numbers, and what it did then."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.flags import CONTROL_PLANE, select, with_settings
from slipstream.cli.planner_calls import TIMEOUT_S, as_json, ask_planner, clock, moment
from slipstream.cli.show import examples
from slipstream.cli.status import duration
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from slipstream.v1.planner_pb2 import (
        ConsideredCounts,
        ModelCounts,
        Plan,
        PlannerAction,
        PlannerDecision,
        WorkerCounts,
    )

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(planner: typer.Typer) -> None:
    planner.command(
        epilog=examples(
            ("slipstream planner explain", "the last decision, with its numbers and what else was weighed"),
            ("slipstream planner explain 118", "one of `slipstream planner history`"),
            ("slipstream planner explain --at 10m", "the one that held ten minutes ago"),
            ("slipstream planner explain --json | jq .numbers", "for programs"),
        ),
    )(explain)
    planner.command(
        epilog=examples(
            ("slipstream planner history", "the latest decisions that changed something"),
            ("slipstream planner history --since 2h --all", "every decision of two hours"),
            ("slipstream planner history --json | jq '.decisions[].reason'", "for programs"),
        ),
    )(history)


@with_settings(*select(*CONTROL_PLANE))
def explain(
    loaded: LoadedConfig,
    number: Annotated[int | None, typer.Argument(min=1, help="Of the decision; the last one when absent.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="The decision that held then: 10m (ago), or a UTC time.")
    ] = None,
    json_wanted: JsonFlag = False,
) -> None:
    """Show why the planner wants the workers that it wants: its last decision, or an earlier one."""
    from slipstream.cli.terminal import output
    from slipstream.v1.planner_pb2 import ExplainRequest, GetPlanRequest, Plan, PlannerDecision

    if number is not None and at is not None:
        raise ConfigError("a decision's number and --at exclude each other")
    address, now_s = loaded.settings.control_plane.address, time.time()
    request = ExplainRequest(number=number, unix_s=None if at is None else moment(at, now_s, "--at"))
    decision = ask_planner(address, lambda stub: stub.Explain(request, timeout=TIMEOUT_S), PlannerDecision)
    if json_wanted:
        print(as_json(decision))  # noqa: T201
        return
    console = output()
    if number is None and at is None:
        plan = ask_planner(address, lambda stub: stub.GetPlan(GetPlanRequest(), timeout=TIMEOUT_S), Plan)
        console.print(who_acts(plan))
        console.print(plan_table(plan), "")
    print_decision(console, decision, now_s)


@with_settings(*select(*CONTROL_PLANE))
def history(
    loaded: LoadedConfig,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Not before: 2h (ago), or a UTC time.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Decisions at most, the latest.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Also decisions to leave all as it is.")] = False,
    json_wanted: JsonFlag = False,
) -> None:
    """List what the planner decided, the latest last."""
    from slipstream.cli.terminal import output
    from slipstream.v1.planner_pb2 import HistoryReply, HistoryRequest

    request = HistoryRequest(
        since_unix_s=0.0 if since is None else moment(since, time.time(), "--since"),
        limit=limit,
        acted_only=not everything,
    )
    address = loaded.settings.control_plane.address
    reply = ask_planner(address, lambda stub: stub.History(request, timeout=TIMEOUT_S), HistoryReply)
    if json_wanted:
        print(as_json(reply))  # noqa: T201
        return
    console = output()
    if reply.decisions:
        console.print(history_table(reply.decisions))
    else:
        what = "nothing" if everything else "nothing that changed something; --all shows every decision"
        console.print(f"Of {reply.remembered} decisions that the planner remembers: {what}")


def who_acts(plan: Plan) -> str:
    """One line on the planner itself."""
    acts = (
        "decides and does nothing (dry run)" if plan.dry_run else "acts" if plan.leading else "stands by: another acts"
    )
    return (
        f"Planner [bold]{plan.holder}[/bold] {acts}; {plan.gpus_used} of {plan.gpu_budget} GPUs in use; "
        f"a decision each {plan.interval_s:g} s"
    )


def plan_table(plan: Plan) -> Table:
    """A row for each model."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for name in ("ready", "wanted", "starting", "draining"):
        table.add_column(name, justify="right")
    for model in plan.models:
        wanted = counts(model.target) if model.HasField("target") else "-"
        table.add_row(Text(model.model), counts(model.actual), wanted, str(model.starting), str(model.draining))
    return table


def print_decision(console: Console, decision: PlannerDecision, now_s: float) -> None:
    """All of one decision."""
    from rich.text import Text

    ago = duration(now_s - decision.unix_s)
    console.print(
        Text.assemble(
            (f"Decision {decision.number}", "bold"),
            (f"  {clock(decision.unix_s)} UTC, {ago} ago\n", "dim"),
            f"{decision.reason or 'no reason given'}",
        ),
        soft_wrap=True,
    )
    console.print(f"  ready {by_model(decision.actual)}; wanted {by_model(decision.targets)}", soft_wrap=True)
    for action in decision.actions:
        console.print(Text(f"  {action_text(action)}", style="red" if action.error else ""), soft_wrap=True)
    if not decision.actions:
        console.print("  nothing to do now")
    elif decision.dry_run or not decision.leading:
        console.print("  not done: " + ("a dry run" if decision.dry_run else "another planner acts"))
    if decision.numbers:
        console.print("", numbers_table(decision))
    if decision.considered:
        console.print("", considered_table(decision.considered))


def numbers_table(decision: PlannerDecision) -> Table:
    """What it was computed from."""
    from rich.table import Table
    from rich.text import Text

    table = Table("from", "", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    only = f"{decision.targets[0].model}." if len(decision.targets) == 1 else ""
    for name in sorted(decision.numbers):
        table.add_row(Text(name.removeprefix(only)), figure(decision.numbers[name]))
    return table


def considered_table(considered: Iterable[ConsideredCounts]) -> Table:
    """The choices that were weighed."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("weighed")
    for name in ("workers", "GPUs", "TTFT", "ITL"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in considered:
        style = "bold" if one.verdict == "chosen" else ""
        row = (counts(one.counts), str(one.gpus), seconds(one.ttft_s), seconds(one.itl_s))
        table.add_row(Text(one.model), *row, Text(one.verdict), style=style)
    return table


def history_table(decisions: Sequence[PlannerDecision]) -> Table:
    """A row for each decision, the latest last."""
    from rich.table import Table
    from rich.text import Text

    table = Table("no.", "UTC", "ready", "wanted", "done", "because", box=None, pad_edge=False, header_style="bold")
    for one in reversed(decisions):
        done = "\n".join(action_text(action) for action in one.actions) or "-"
        mark = " (dry run)" if one.dry_run else "" if one.leading else " (stands by)"
        table.add_row(
            str(one.number),
            clock(one.unix_s),
            Text(by_model(one.actual)),
            Text(by_model(one.targets)),
            Text(f"{done}{mark if one.actions else ''}"),
            Text(one.reason),
        )
    return table


def action_text(action: PlannerAction) -> str:
    """`start decode-3: decode for m`, `flip prefill-1 to decode`, `drain decode-2`."""
    from slipstream.v1.planner_pb2 import PlannerAction
    from slipstream.v1.registry_pb2 import Role

    role = {Role.ROLE_PREFILL: "prefill", Role.ROLE_DECODE: "decode"}.get(action.role, "?")
    if action.kind == PlannerAction.START:
        said = f"start {role} for {action.model}" + (f": {action.worker_id}" if action.worker_id else "")
    elif action.kind == PlannerAction.FLIP:
        said = f"flip {action.worker_id} to {role}"
    else:
        said = f"drain {action.worker_id}"
    return f"{said} failed: {action.error}" if action.error else said


def counts(workers: WorkerCounts) -> str:
    """`2P3D`."""
    return f"{workers.prefill}P{workers.decode}D"


def by_model(models: Sequence[ModelCounts]) -> str:
    """`2P3D`, or `a 2P3D, b 1P1D` of several models."""
    if len(models) == 1:
        return counts(models[0].counts)
    return ", ".join(f"{one.model} {counts(one.counts)}" for one in models) or "nothing"


def seconds(value: float) -> str:
    """`1.23 s`, `45.6 ms`; `-` of nothing, `∞` of what never ends."""
    if math.isnan(value) or value < 0:
        return "-"
    if math.isinf(value):
        return "∞"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def figure(value: float) -> str:
    """Whole numbers whole, others with four significant digits."""
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:,.4g}"
