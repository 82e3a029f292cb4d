"""`slipstream status`: what the registry knows of the workers, and of the ways of KV blocks between them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.flags import CONTROL_PLANE, select, with_settings
from slipstream.cli.paths import path_rows, paths_table, worth_showing
from slipstream.cli.show import examples
from slipstream.cli.worker_sets import worker_sets
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from slipstream.v1.registry_pb2 import WorkerRecord, WorkerSet

PANEL = "Use a cluster"


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream status", "one row for each worker, and one for each pair of them"),
            ("slipstream status --watch", "the same, kept up to date until Ctrl-C"),
            ("slipstream status --json | jq '.workers[].state'", "for programs"),
        ),
    )(status)


@with_settings(*select(*CONTROL_PLANE))
def status(
    loaded: LoadedConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch a line for each change.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep it up to date until Ctrl-C.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Longest wait for the registry's answer.")] = 5.0,
) -> None:
    """Show the cluster's workers (role, state, load, KV use, fallbacks) and the measured ways between them."""
    if not timeout_s > 0:
        raise ConfigError(f"--timeout-s = {timeout_s:g} must be more than 0")
    address = loaded.settings.control_plane.address
    try:
        asyncio.run(_show(address, as_json=as_json, watch=watch, timeout_s=timeout_s))
    except KeyboardInterrupt:
        raise typer.Exit(0 if watch else 130) from None


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker as it is shown. Names and units are those of `slipstream.v1.WorkerRecord`."""

    worker_id: str
    role: str
    state: str
    model: str
    address: str
    metrics_url: str
    device: str
    pid: int
    running: int
    waiting: int
    blocks_used: int
    blocks: int
    block_bytes: int
    handoffs_held: int
    requests_total: int
    tokens_total: int
    fallbacks_total: int
    started_unix_s: int
    uptime_s: float
    startup: dict[str, float]
    health: str
    reasons: tuple[str, ...]
    fenced_because: str


def rows(worker_set: WorkerSet, now_unix_s: float) -> list[WorkerRow]:
    """The workers in order of role and name."""
    return sorted(
        (_row(record, now_unix_s) for record in worker_set.workers),
        key=lambda row: (row.role != "prefill", row.worker_id),
    )


def health_of(record: WorkerRecord) -> str:
    """`healthy`, `suspect` or `sick`; empty where nothing watches."""
    from slipstream.v1.registry_pb2 import HealthState

    return HealthState.Name(record.health.state).lower() if record.health.state else ""


def duration(seconds: float) -> str:
    """`42s`, `3m 12s`, `5h 3m`, `12d 4h`."""
    whole = max(0, int(seconds))
    for unit_s, unit, smaller_s, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s}{unit} {whole % unit_s // smaller_s}{smaller}"
    return f"{whole}s"


async def _show(address: str, *, as_json: bool, watch: bool, timeout_s: float) -> None:
    from rich.live import Live

    from slipstream.cli.terminal import output

    console = output()
    sets = worker_sets(address, timeout_s)
    try:
        if watch and not as_json and console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                async for worker_set in sets:
                    live.update(_page(worker_set, address), refresh=True)
        async for worker_set in sets:
            if as_json:
                print(json.dumps(_as_json(worker_set), indent=None if watch else 2), flush=True)  # noqa: T201
            else:
                console.print(_page(worker_set, address))
            if not watch:
                return
    finally:
        await sets.aclose()


def _row(record: WorkerRecord, now_unix_s: float) -> WorkerRow:
    from slipstream.v1.registry_pb2 import Role, WorkerState

    load, capacity = record.load, record.capacity
    return WorkerRow(
        worker_id=record.worker_id,
        role=Role.Name(record.role).removeprefix("ROLE_").lower(),
        state=WorkerState.Name(record.state).removeprefix("WORKER_STATE_").lower(),
        model=record.model,
        address=record.address,
        metrics_url=record.metrics_url,
        device=record.device,
        pid=record.pid,
        running=load.running,
        waiting=load.waiting,
        blocks_used=load.blocks_used,
        blocks=capacity.blocks,
        block_bytes=capacity.block_bytes,
        handoffs_held=load.handoffs_held,
        requests_total=load.requests_total,
        tokens_total=load.tokens_total,
        fallbacks_total=load.fallbacks_total,
        started_unix_s=record.started_unix_s,
        uptime_s=max(0.0, round(now_unix_s - record.started_unix_s, 1)),
        startup={phase.name: round(seconds, 3) for phase, seconds in record.startup.ListFields()},
        health=health_of(record),
        reasons=tuple(one.text for one in record.health.reasons),
        fenced_because=record.health.fenced_because,
    )


def _as_json(worker_set: WorkerSet) -> dict[str, object]:
    return {
        "settled": worker_set.settled,
        "lease_s": worker_set.lease_s,
        "registry_id": worker_set.registry_id,
        "workers": [asdict(row) for row in rows(worker_set, time.time())],
        "paths": [asdict(row) for row in path_rows(worker_set)],
    }


_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow"}
HEALTH_STYLES = {"healthy": "green", "suspect": "yellow", "sick": "bold red"}


def _page(worker_set: WorkerSet, address: str) -> Group:
    from rich.console import Group

    from slipstream.v1.registry_pb2 import Role

    prefill_ids = {record.worker_id for record in worker_set.workers if record.role == Role.ROLE_PREFILL}
    paths, left_out = worth_showing(path_rows(worker_set), prefill_ids)
    parts: list[Table | str] = [_table(worker_set, address)]
    if any(record.health.reasons or record.health.fenced_because for record in worker_set.workers):
        parts += ["", _health_table(worker_set)]
    if paths:
        parts += ["", paths_table(paths, left_out=left_out)]
    return Group(*parts)


def _health_table(worker_set: WorkerSet) -> Table:
    """What is wrong with those that are not well: a row for each thing."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("not well", "health", "why"):
        table.add_column(name)
    for row in rows(worker_set, time.time()):
        why = [*row.reasons, *([f"fenced: {row.fenced_because}"] if row.fenced_because else [])]
        for place, reason in enumerate(why):
            first = place == 0
            health = Text(row.health if first else "", style=HEALTH_STYLES.get(row.health, ""))
            table.add_row(Text(row.worker_id if first else ""), health, Text(reason))
    return table


def _table(worker_set: WorkerSet, address: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", caption_justify="left")
    for name in ("worker", "role", "state", "model", "address"):
        table.add_column(name)
    for name in (
        "running",
        "waiting",
        "KV blocks",
        "KV",
        "handoffs",
        "requests",
        "tokens",
        "fallbacks",
        "start",
        "uptime",
    ):
        table.add_column(name, justify="right")
    for row in rows(worker_set, time.time()):
        table.add_row(
            Text(row.worker_id),
            Text(row.role),
            Text(row.state, style=_STATE_STYLES.get(row.state, "red")),
            Text(row.model),
            Text(row.address),
            str(row.running),
            str(row.waiting),
            f"{row.blocks_used}/{row.blocks}",
            f"{row.blocks_used / row.blocks:.0%}" if row.blocks else "-",
            str(row.handoffs_held),
            f"{row.requests_total:,}",
            f"{row.tokens_total:,}",
            Text(f"{row.fallbacks_total:,}", style="bold red" if row.fallbacks_total else ""),
            f"{row.startup['total']:.1f}s" if "total" in row.startup else "-",
            duration(row.uptime_s) if row.started_unix_s else "-",
        )
    if not worker_set.workers:
        table.caption = f"The registry at {address} knows no worker."
    elif not worker_set.settled:
        table.caption = "The registry has just started and may not know all workers yet."
    return table
