"""A simulation's outcome for people: a table for the terminal, and one HTML page with plots that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from rich.console import Group
from rich.table import Table

from simulator.charts import STYLE, Chart, Series, clock, figure
from simulator.outcome import Figures, Interval, Latencies, Limits, Outcome
from simulator.scaling import Done

MAX_DECISIONS = 200
SHOWN_DECISIONS = 12
"""Rows of the page's table of decisions, and of the terminal's."""

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1500px;margin:2rem auto;
padding:0 1rem}}h1{{font-size:1.5rem}}h2{{font-size:1.15rem;margin-top:2rem}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr));gap:1rem}}
figure{{margin:0}}figcaption{{font-weight:600;font-size:.9rem}}
.wide{{overflow-x:auto}}table{{border-collapse:collapse;font-size:.85rem}}
th,td{{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--grid);white-space:nowrap}}
th:first-child,td:first-child,td.text{{text-align:left}}th{{color:var(--soft);font-weight:600}}
</style><body><h1>{title}</h1><p>{summary}</p>{body}</body></html>
"""


def tables(outcome: Outcome, title: str = "Simulation") -> Group:
    """For a terminal: a column for each model and class."""
    figures = [_cells(one) for one in _rows(outcome)]
    table = Table(title=title, title_justify="left")
    for number, name in enumerate([_COLUMNS[0], *(cells[0] for cells in figures)]):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for number, name in enumerate(_COLUMNS[1:], start=1):
        table.add_row(name, *(cells[number] for cells in figures))
    if not outcome.decisions:
        return Group(table, _summary(outcome))
    decisions = Table(title=_decisions_title(outcome, SHOWN_DECISIONS), title_justify="left")
    for name in ("at", "actions", "why"):
        decisions.add_column(name, overflow="fold")
    for decided in outcome.decisions[:SHOWN_DECISIONS]:
        decisions.add_row(clock(decided.at_s), _actions(decided.actions), decided.reason)
    return Group(table, _summary(outcome), decisions)


def html(outcome: Outcome, title: str = "Simulation") -> str:
    """The page. The same text for the same outcome."""
    body = [_html_table(_COLUMNS, [_cells(one) for one in _rows(outcome)])]
    models = list(dict.fromkeys(one.model for one in outcome.series))
    for model in models:
        rows = [one for one in outcome.series if one.model == model]
        limits = [one for one in outcome.limits if one.model == model]
        charts = "".join(figure(chart) for chart in _charts(rows, limits))
        body.append(f'<h2>{escape(model)}</h2><div class="charts">{charts}</div>')
    if outcome.decisions:
        told = [
            (clock(one.at_s), _actions(one.actions), ", ".join(f"{m} {c}" for m, c in one.targets.items()), one.reason)
            for one in outcome.decisions[:MAX_DECISIONS]
        ]
        body.append(f"<h2>{escape(_decisions_title(outcome, MAX_DECISIONS))}</h2>")
        body.append(_html_table(("at", "actions", "wanted", "why"), told, text=True))
    return _PAGE.format(title=escape(title), style=STYLE, summary=escape(_summary(outcome)), body="".join(body))


# -- numbers ----------------------------------------------------------------------------------------------

_COLUMNS = (
    "requests of",
    "requests",
    "refused",
    "failed",
    "TTFT p50/p90/p99 s",
    "ITL p50/p90/p99 ms",
    "end-to-end p50/p90/p99 s",
    "cached",
    "within limits",
    "good/s",
)


def _rows(outcome: Outcome) -> list[Figures]:
    return [*outcome.classes, outcome.all] if len(outcome.classes) > 1 else outcome.classes


def _cells(one: Figures) -> tuple[str, ...]:
    return (
        f"{one.model} {one.service_class}".strip() or "all",
        f"{one.requests:,}",
        f"{one.refused:,}",
        f"{one.failed:,}",
        _points(one.ttft, 1.0, 2),
        _points(one.itl, 1e3, 1),
        _points(one.e2e, 1.0, 1),
        f"{one.hit_rate:.1%}",
        f"{one.attainment:.2%}",
        f"{one.goodput_per_s:.2f}",
    )


def _points(of: Latencies, scale: float, digits: int) -> str:
    return " / ".join(f"{seconds * scale:.{digits}f}" for seconds in (of.p50_s, of.p90_s, of.p99_s))


def _summary(outcome: Outcome) -> str:
    return (
        f"{clock(outcome.duration_s)} of virtual time, {outcome.gpu_hours:.2f} GPU-hours, at most {outcome.peak_gpus} "
        f"GPUs, {outcome.good_per_gpu_hour:,.0f} requests within their limits for each GPU-hour, "
        f"{outcome.actions} scaling actions ({outcome.refused_actions} refused), seed {outcome.seed}"
    )


def _decisions_title(outcome: Outcome, shown: int) -> str:
    count = len(outcome.decisions)
    return f"Decisions ({count})" if count <= shown else f"Decisions (the first {shown} of {count})"


def _actions(actions: Sequence[Done]) -> str:
    told = []
    for one in actions:
        what = f"{one.kind} {one.role}" + (f" {one.worker_id}" if one.worker_id else "")
        told.append(f"{what} (refused: {one.refused})" if one.refused else what)
    return ", ".join(told)


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    kind = ' class="text"' if text else ""
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


# -- plots ------------------------------------------------------------------------------------------------


def _charts(rows: Sequence[Interval], limits: Sequence[Limits]) -> list[Chart]:
    times_s = [one.at_s for one in rows]
    first = next(iter(limits), None)

    def line(name: str, of: Callable[[Interval], float], *, stepped: bool = False) -> Series:
        return Series(name, [of(one) for one in rows], stepped)

    lengths_s = [max(1e-9, after - before) for before, after in zip([0.0, *times_s], times_s, strict=False)]
    per_s = {
        name: [count / length_s for count, length_s in zip(counts, lengths_s, strict=True)]
        for name, counts in (
            ("arrived", [one.arrivals for one in rows]),
            ("answered within limits", [one.good for one in rows]),
            ("refused or failed", [one.refused + one.failed for one in rows]),
        )
    }
    return [
        Chart("Requests", "/s", times_s, [Series(name, values) for name, values in per_s.items()]),
        Chart(
            "Time to first token",
            "s",
            times_s,
            [line("p99", lambda one: one.ttft_p99_s), line("p50", lambda one: one.ttft_p50_s)],
            (f"limit ({first.service_class})", first.ttft_s) if first is not None else None,
        ),
        Chart(
            "Inter-token latency (mean of an answer)",
            "ms",
            times_s,
            [line("p99", lambda one: one.itl_p99_s * 1e3), line("p50", lambda one: one.itl_p50_s * 1e3)],
            (f"limit ({first.service_class})", first.itl_s * 1e3) if first is not None else None,
        ),
        Chart(
            "Answered within limits, of what ended",
            "%",
            times_s,
            [Series("attainment", _attainment(rows))],
            most=100.0,
        ),
        Chart(
            "Queues",
            "requests",
            times_s,
            [
                line("wait at frontends", lambda one: one.queued),
                line("wait at workers", lambda one: one.waiting),
                line("run", lambda one: one.running),
            ],
        ),
        Chart(
            "Workers",
            "",
            times_s,
            [
                line("prefill", lambda one: one.prefill, stepped=True),
                line("decode", lambda one: one.decode, stepped=True),
                line("starting or flipping", lambda one: one.starting, stepped=True),
                line("draining", lambda one: one.draining, stepped=True),
                line("GPUs", lambda one: one.gpus, stepped=True),
            ],
        ),
    ]


def _attainment(rows: Sequence[Interval]) -> list[float]:
    """In percent; where nothing ended, as before."""
    values, last = [], 100.0
    for one in rows:
        ended = one.finished + one.refused + one.failed
        last = 100.0 * one.good / ended if ended else last
        values.append(last)
    return values
