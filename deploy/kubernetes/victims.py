"""Which of a Deployment's pods Kubernetes ends when there shall be one fewer. Pure.

A ReplicaSet takes what is not assigned to a node before what is, then Pending before Running, then not ready before
ready, and only then what costs less by the annotation `controller.kubernetes.io/pod-deletion-cost`. So the annotation
alone chooses among ready pods, and no pod that runs while another one starts. While a Deployment is being updated it
has two ReplicaSets, and shares the loss out between them: then it chooses nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable

from deploy.kubernetes.objects import Pod

LEAST_COST = -(2**31)
"""The lowest that there is: Karpenter, where it writes costs too, begins there."""

_PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}


def goes_first(chosen: Pod, pods: Iterable[Pod]) -> bool:
    """Whether the chosen one, with the lowest cost, is surely the one that ends when its pool has one seat fewer.

    Args:
        pods: of the pool.
    """
    others = [one for one in pods if one.active and one.uid != chosen.uid]
    if any(one.template != chosen.template for one in others):
        return False
    own = (*_standing(chosen), LEAST_COST)
    return all(own < (*_standing(one), one.deletion_cost) for one in others)


def _standing(pod: Pod) -> tuple[bool, int, bool]:
    return (pod.assigned, _PHASES.get(pod.phase, 2), pod.ready)
