"""Grafana's dashboards as plain data: panels in rows, and the JSON that Grafana imports.

Only what our dashboards need of Grafana's model (schema version 39, Grafana 10 and newer). Every panel takes its data
from the variable `datasource`, so that a dashboard fits any Prometheus.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_STAT_HEIGHT, _HEIGHT = 4, 8

Unit = Literal["s", "reqps", "short", "percentunit", "bytes", "Bps", "ops", "none"]


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: a line for each series, or with `stat` a single number.

    Attributes:
        help: how to use it; shown at the panel's corner.
    """

    title: str
    help: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    stat: bool = False
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A heading, and panels side by side below it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top: the values of a label of a metric."""

    name: str
    metric: str
    label: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """`uid` stays the same over versions, so that links and imports find it again."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


def quantiles(metric: str, selector: str, *shares: float, by: str = "") -> tuple[Query, ...]:
    """Percentiles of a histogram over the last moments.

    Args:
        selector: label matchers, without braces.
        by: one more label to keep apart.
    """
    labels = f"le, {by}" if by else "le"
    rate = f"sum by ({labels}) (rate({metric}_bucket{{{selector}}}[$__rate_interval]))"
    legend = f"{{{{{by}}}}} " if by else ""
    return tuple(Query(f"histogram_quantile({share}, {rate})", f"{legend}p{share * 100:g}") for share in shares)


def rate(metric: str, selector: str = "", by: str = "") -> Query:
    """What a counter grows by in a second, summed."""
    grouping = f" by ({by})" if by else ""
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(",")) if by else "all"
    return Query(f"sum{grouping} (rate({metric}{{{selector}}}[$__rate_interval]))", legend)


def ratio(part: str, whole: str, selector: str, by: str = "") -> Query:
    """What part of one counter's growth another one's is."""
    grouping = f" by ({by})" if by else ""
    over = [f"sum{grouping} (rate({metric}{{{selector}}}[$__rate_interval]))" for metric in (part, whole)]
    return Query(f"{over[0]} / {over[1]}", f"{{{{{by}}}}}" if by else "all")


def render(dashboard: Dashboard) -> str:
    """The JSON that Grafana imports, always the same for the same dashboard."""
    content = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["slipstream"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "templating": {"list": [_source_variable(), *map(_variable, dashboard.variables)]},
        "links": [{"type": "dashboards", "tags": ["slipstream"], "title": "Slipstream", "asDropdown": True}],
        "panels": list(_panels(dashboard.rows)),
    }
    return json.dumps(content, indent=1) + "\n"


def _panels(rows: Iterable[Row]) -> Iterable[dict[str, Any]]:
    top, number = 0, 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": _place(top, 0, _COLUMNS, 1),
        }
        height = _STAT_HEIGHT if all(panel.stat for panel in row.panels) else _HEIGHT
        width = _COLUMNS // len(row.panels)
        for index, panel in enumerate(row.panels):
            number += 1
            yield _panel(panel, number, _place(top + 1, index * width, width, height))
        top += 1 + height


def _place(top: int, left: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if not panel.stat:
        stacking = {"mode": "normal", "group": "A"} if panel.stacked else {"mode": "none"}
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 30 if panel.stacked else 8, "stacking": stacking}
    content: dict[str, Any] = {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
    }
    if panel.stat:
        content["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    else:
        content["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return content


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.metric}, {variable.label})"
    return {
        "name": variable.name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": variable.name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
