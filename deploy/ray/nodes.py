"""What Ray says of its nodes. The one place that uses what Ray does not promise to keep (`ray._private`).

Ray's public functions tell which nodes are alive and how much they have, but neither how much is free on each nor
which of them are about to go; the state API knows more, and only where a dashboard runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node that is alive.

    Attributes:
        free: of its resources, by Ray's names.
        gone_at_s: when it will be gone (Unix time), of one that was announced to drain; infinite where no time was
            said, and none where it stays.
    """

    node_id: str
    host: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    gone_at_s: float | None = None

    @property
    def stays(self) -> bool:
        return self.gone_at_s is None


def read_nodes() -> list[RayNode]:
    """The nodes that are alive now. Blocks for a few calls to Ray's head; needs `ray.init` before."""
    import ray
    from ray._private import state

    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    draining: Mapping[str, int] = state.state.get_draining_nodes()
    free: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [
        RayNode(
            node_id=node["NodeID"],
            host=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            gone_at_s=_gone_at_s(draining.get(node["NodeID"])),
        )
        for node in known
        if node["Alive"]
    ]


def drain_node(node_id: str, *, deadline_s: float, reason: str) -> None:
    """Announce that a node will be gone in so many seconds, as a cloud's notice of preemption does.

    Raises:
        RuntimeError: Ray refuses.
    """
    import ray
    from ray.core.generated import autoscaler_pb2

    reasons: Any = autoscaler_pb2
    raylet: Any = ray._raylet
    client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = client.drain_node(
        node_id,
        reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        reason,
        int((time.time() + deadline_s) * 1000),
    )
    if not accepted:
        raise RuntimeError(f"Ray does not drain {node_id}: {why}")


def _gone_at_s(deadline_ms: int | None) -> float | None:
    if deadline_ms is None:
        return None
    return deadline_ms / 1000 if deadline_ms > 0 else math.inf
