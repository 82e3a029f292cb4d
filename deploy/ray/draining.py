"""Until when a worker on a node that is about to go may wait for its replacement. Pure: the time is passed in."""

from __future__ import annotations

import math

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
