"""Line charts as inline SVG: small, without scripts or network, readable in light and dark. Nothing but text is made.

A chart shows a few series over time with a legend and a grid; resting the pointer on it tells the values there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26
MAX_POINTS = 480
"""Points of a series that are drawn; of more, the largest of each few is."""

COLOURS = 6
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#6b7280;--grid:#e4e7eb;--page:#fff;--c0:#0072b2;--c1:#d55e00;
--c2:#009e73;--c3:#9a5b8a;--c4:#b58900;--c5:#56788f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa3ad;--grid:#30363d;--page:#14171a;--c0:#56b4e9;
--c1:#ff8c42;--c2:#3ecf9a;--c3:#e39ccb;--c4:#f0d043;--c5:#a9c1d0}}
svg.chart{max-width:100%;height:auto;font:11px system-ui,sans-serif}
svg.chart text{fill:var(--soft)}svg.chart .grid{stroke:var(--grid)}
svg.chart path{fill:none;stroke-width:1.6}svg.chart .limit{stroke:var(--soft);stroke-dasharray:5 4}
svg.chart .hit{fill:transparent}svg.chart .hit:hover{fill:var(--grid);fill-opacity:.5}
.legend{font-size:12px;color:var(--soft)}.legend i{display:inline-block;width:14px;height:3px;margin:0 5px 3px 12px}
""" + "".join(f"path.s{n}{{stroke:var(--c{n})}}i.s{n}{{background:var(--c{n})}}" for n in range(COLOURS))


@dataclass(frozen=True, slots=True)
class Series:
    """Values beside the chart's times; `stepped`: each holds until the next, such as a count of workers."""

    name: str
    values: Sequence[float]
    stepped: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. `limit` is a dashed line, with what it is called."""

    title: str
    unit: str
    times_s: Sequence[float]
    series: Sequence[Series]
    limit: tuple[str, float] | None = None
    most: float | None = None


def figure(chart: Chart) -> str:
    """As an HTML figure with title, SVG and legend."""
    every = max(1, math.ceil(len(chart.times_s) / MAX_POINTS))
    times_s = chart.times_s[every - 1 :: every] if every > 1 else chart.times_s
    series = [Series(one.name, _thinned(one.values, every)[: len(times_s)], one.stepped) for one in chart.series]
    top = chart.most or _nice_top(max([value for one in series for value in one.values] + _limit_shown(chart, series)))
    end_s = max(times_s, default=1.0) or 1.0
    parts = [_grid(top, end_s, chart.unit)]
    if chart.limit is not None and chart.limit[1] <= top:
        y = _y(chart.limit[1], top)
        parts.append(f'<path class="limit" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    for number, one in enumerate(series):
        parts.append(f'<path class="s{number % COLOURS}" d="{_path(times_s, one, top, end_s)}"/>')
    parts.append(_hits(times_s, series, end_s, chart.unit))
    names = [f'<i class="s{n % COLOURS}"></i>{escape(one.name)}' for n, one in enumerate(series)]
    if chart.limit is not None:
        names.append(f" · {escape(chart.limit[0])}: {_number(chart.limit[1])} {escape(chart.unit)}")
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f'{"".join(parts)}</svg><div class="legend">{"".join(names)}</div></figure>'
    )


def _thinned(values: Sequence[float], every: int) -> list[float]:
    if every == 1:
        return list(values)
    return [max(values[start : start + every]) for start in range(0, len(values), every)]


def _limit_shown(chart: Chart, series: Sequence[Series]) -> list[float]:
    """The limit belongs on the chart unless everything is far below it."""
    if chart.limit is None:
        return [0.0]
    largest = max((value for one in series for value in one.values), default=0.0)
    return [chart.limit[1]] if chart.limit[1] < 4 * largest else [0.0]


def _nice_top(largest: float) -> float:
    if largest <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(largest))
    return next(scale * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if scale * step >= largest * 0.999)


def _x(time_s: float, end_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * time_s / end_s


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(value, top) / top


def _path(times_s: Sequence[float], one: Series, top: float, end_s: float) -> str:
    parts: list[str] = []
    for time_s, value in zip(times_s, one.values, strict=False):
        x, y = f"{_x(time_s, end_s):.1f}", f"{_y(value, top):.1f}"
        parts.append(f"M{x} {y}" if not parts else f"H{x}V{y}" if one.stepped else f"L{x} {y}")
    return "".join(parts)


def _grid(top: float, end_s: float, unit: str) -> str:
    parts: list[str] = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(top * share, top)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        text = f"{_number(top * share)} {escape(unit)}" if share == 1.0 else _number(top * share)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    step_s = _time_step(end_s)
    for number in range(int(end_s / step_s) + 1):
        x = _x(number * step_s, end_s)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{clock(number * step_s)}</text>')
    return "".join(parts)


def _hits(times_s: Sequence[float], series: Sequence[Series], end_s: float, unit: str) -> str:
    """Invisible columns that tell the values under the pointer."""
    parts, before = [], LEFT * 1.0
    for place, time_s in enumerate(times_s):
        x = _x(time_s, end_s)
        told = ", ".join(f"{one.name} {_number(one.values[place])}" for one in series if place < len(one.values))
        parts.append(
            f'<rect class="hit" x="{before:.1f}" y="{TOP}" width="{max(0.1, x - before):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{clock(time_s)}: {escape(told)} {escape(unit)}</title></rect>'
        )
        before = x
    return "".join(parts)


def _time_step(end_s: float) -> float:
    steps = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
    return next((step for step in steps if end_s / step <= 8), 86400.0 * math.ceil(end_s / 86400 / 8))


def clock(time_s: float) -> str:
    """Hours and minutes, or minutes and seconds below an hour's."""
    whole = round(time_s)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    hours = f"{whole // 3600}:{whole // 60 % 60:02}"
    return f"{hours}:{whole % 60:02}" if whole % 60 else f"{hours} h"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
