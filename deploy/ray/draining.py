"""Until when a worker on a node that is about to go may wait for its replacement. Pure: the time is passed in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from deploy.ray.nodes import RayNode

MARGIN_S = 5.0
"""For what a drain costs besides the open requests."""


def leave_at_s(announced_s: float, gone_at_s: float, *, drain_timeout_s: float, start_limit_s: float) -> float:
    """When the worker has to begin to drain, its replacement ready or not.

    Early enough that open requests can finish before the node is gone; of a short notice the replacement gets half.

    Args:
        announced_s: when the node was first seen draining.
        gone_at_s: infinite where no time was said.
        start_limit_s: longest a replacement may take to be ready.
    """
    if math.isinf(gone_at_s):
        return announced_s + start_limit_s
    notice_s = max(0.0, gone_at_s - announced_s)
    lead_s = min(drain_timeout_s + MARGIN_S, notice_s / 2)
    return min(gone_at_s - lead_s, announced_s + start_limit_s)


class DrainingNodes:
    """Remembers since when each node is known to be about to go; see `leave_at_s` for the limits."""

    def __init__(self, *, drain_timeout_s: float, start_limit_s: float) -> None:
        self._drain_timeout_s = drain_timeout_s
        self._start_limit_s = start_limit_s
        self._announced_s: dict[str, float] = {}

    def look(self, nodes: Iterable[RayNode], now_s: float) -> Mapping[str, float]:
        """When the workers have to begin to leave each node that will go (Unix time), by its id."""
        going = {node.node_id: node.gone_at_s for node in nodes if node.gone_at_s is not None}
        self._announced_s = {node_id: self._announced_s.get(node_id, now_s) for node_id in going}
        return {
            node_id: leave_at_s(
                self._announced_s[node_id],
                gone_at_s,
                drain_timeout_s=self._drain_timeout_s,
                start_limit_s=self._start_limit_s,
            )
            for node_id, gone_at_s in going.items()
        }
