"""How `slipstream top` looks: one line of the cluster, one row a worker, as many as fit."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from slipstream.cli.top_figures import ClusterFigures, Figures, WorkerFigures

_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow"}
_LINES_AROUND = 7  # title, two lines of figures, an empty line, the table's head, what was left out, the cursor
_NARROW_BAR = 10


def page(shown: Figures, registry: str, *, lines: int | None = None) -> Group:
    """The whole screen.

    Args:
        lines: of the terminal; rows that do not fit are counted instead. None: all of them.
    """
    cluster, problems = shown.cluster, [Text(f"! {problem}", style="bold red") for problem in shown.problems]
    problems += [
        Text(f"! {one.worker_id} is {one.health or one.state}: {one.why}", style="bold red", no_wrap=True)
        for one in shown.workers
        if one.why and (one.health == "sick" or one.state == "fenced")
    ]
    room = len(shown.workers) if lines is None else max(1, lines - _LINES_AROUND - len(problems))
    table = _workers(shown.workers[:room])
    left_out = len(shown.workers) - room
    if left_out > 0:
        table.caption = f"and {left_out} more"
    elif not shown.workers:
        table.caption = f"The registry at {registry} knows no worker."
    title = Text.assemble(("slipstream top", "bold"), f"  {registry}, the last {cluster.seconds:.0f} s")
    return Group(title, *_cluster(cluster), *problems, Text(), table)


def _cluster(one: ClusterFigures) -> tuple[Text, Text]:
    errors = ("", "") if not one.errors_per_s else (f" ({one.errors_per_s:.1f} failed)", "bold red")
    rates = _facts(
        ("requests/s", f"{one.requests_per_s:.1f}", errors),
        ("tokens/s", f"{one.tokens_per_s:,.0f}"),
        ("prompt tokens/s", f"{one.prompt_tokens_per_s:,.0f}"),
        ("KV hit rate", _percent(one.hit_rate)),
    )
    times = _facts(
        ("TTFT", f"{_time(one.ttft_p50_s)} p50, {_time(one.ttft_p99_s)} p99"),
        ("ITL", f"{_time(one.itl_p50_s)} p50, {_time(one.itl_p99_s)} p99"),
        ("in flight", f"{one.in_flight}"),
        ("before first token", f"{one.awaiting}"),
        ("queued in engines", f"{one.queued}"),
    )
    return rates, times


def _facts(*facts: tuple[str, str] | tuple[str, str, tuple[str, str]]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, value, *more in facts:
        text.append(f"{name} ", "dim").append(value, "bold")
        for extra, style in more:
            text.append(extra, style)
        text.append("   ")
    return text


def _workers(rows: tuple[WorkerFigures, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for name in ("worker", "role", "state"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in ("running", "waiting", "KV use", "hit rate", "tokens/s", "handoffs", "fallbacks"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.worker_id),
            Text(row.role),
            Text(row.state, style=_STATE_STYLES.get(row.state, "red")),
            str(row.running),
            Text(str(row.waiting), style="yellow" if row.waiting else ""),
            _bar(row.kv_use),
            _percent(row.hit_rate),
            f"{row.tokens_per_s:,.0f}",
            str(row.handoffs_held),
            Text(f"{row.fallbacks_total:,}", style="bold red" if row.fallbacks_total else ""),
        )
    return table


def _bar(share: float | None) -> Text:
    if share is None:
        return Text("-")
    full = round(share * _NARROW_BAR)
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    return Text.assemble(("█" * full, style), ("░" * (_NARROW_BAR - full), "dim"), f" {share:4.0%}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
