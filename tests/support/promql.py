"""What a PromQL expression asks of the metrics it is about: their names, and the labels each must have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser

# Prometheus adds these to whatever it scrapes.
ADDED_LABELS = frozenset({"job", "instance"})


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric of an expression, with the labels that it is matched or grouped by.

    Grafana's variables are taken for what they stand for.

    Raises:
        ValueError: it is no PromQL.
    """
    for name, value in (("$__rate_interval", "5m"), ("$model", ".*"), ("$worker", ".*")):
        expression = expression.replace(name, value)
    yield from _asked(promql_parser.parse(expression), set())


def _asked(node: Any, grouped: set[str]) -> Iterator[tuple[str, set[str]]]:
    """Labels of an outer grouping must be there in what is grouped."""
    match node:
        case promql_parser.VectorSelector():
            matched = {matcher.name for matcher in node.matchers.matchers}
            assert node.name, f"{node}: no metric"
            yield node.name, (matched | grouped) - ADDED_LABELS
        case promql_parser.MatrixSelector():
            yield from _asked(node.vector_selector, grouped)
        case promql_parser.AggregateExpr():
            own = set(node.modifier.labels) if node.modifier is not None else set()
            yield from _asked(node.expr, own)
        case promql_parser.Call():
            needs = grouped | ({"le"} if node.func.name == "histogram_quantile" else set())
            for argument in node.args:
                yield from _asked(argument, needs)
        case promql_parser.BinaryExpr():
            matching = None if node.modifier is None else node.modifier.matching
            on = set(matching.labels) if matching is not None else set()
            for side in (node.lhs, node.rhs):
                yield from _asked(side, grouped | on)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            yield from _asked(node.expr, grouped)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            raise ValueError(f"{type(node).__name__} is not known here")
