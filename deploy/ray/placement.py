"""Which node the next worker gets: spread over the nodes, so that the loss of one takes as few as possible. Pure.

Ray's own strategies spread the bundles of one placement group, and every worker has a group of its own; left to
itself, Ray packs single bundles onto the fullest node that has room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from deploy.ray.nodes import RayNode
from slipstream.v1.registry_pb2 import Role

Bundle = Mapping[str, float]
"""What a worker takes of its node, by Ray's names of resources."""

_ROUNDING = 1e-6


def choose_node(
    nodes: Iterable[RayNode], bundle: Bundle, role: Role.ValueType, placed: Iterable[tuple[str, Role.ValueType]]
) -> str | None:
    """The node for a worker of this role: that with the fewest of its role, then with the fewest in all.

    Args:
        placed: node and role of the workers that are there, or about to be.

    Returns:
        None where no node that stays has room now.
    """
    there = list(placed)
    same = Counter(node_id for node_id, other in there if other == role)
    all_roles = Counter(node_id for node_id, _ in there)
    fitting = [node for node in nodes if node.stays and _fits(bundle, node.free)]
    if not fitting:
        return None
    best = min(fitting, key=lambda node: (same[node.node_id], all_roles[node.node_id], _fill(node), node.node_id))
    return best.node_id


def describe_bundle(bundle: Bundle) -> str:
    """`1 CPU + 8 GPU`."""
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def describe_room(nodes: Iterable[RayNode], bundle: Bundle) -> str:
    """What of that is free where, for people: `10.0.0.1: 0 of 8 GPU free; 10.0.0.2 (draining): ...`."""
    rows = []
    for node in nodes:
        free = ", ".join(f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}" for name in bundle)
        rows.append(f"{node.host}{'' if node.stays else ' (draining)'}: {free} free")
    return "; ".join(rows) or "no node is alive"


def _fits(bundle: Bundle, free: Mapping[str, float]) -> bool:
    return all(free.get(name, 0.0) + _ROUNDING >= amount for name, amount in bundle.items())


def _fill(node: RayNode) -> float:
    """How full the node is of what is scarcest there."""
    shares = [
        1.0 - node.free.get(name, 0.0) / node.total[name] for name in ("CPU", "GPU") if node.total.get(name, 0.0) > 0
    ]
    return round(max(shares, default=0.0), 3)
