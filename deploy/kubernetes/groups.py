"""Which pods are workers: each pod of a Deployment, and of each group of a LeaderWorkerSet its leader. Pure.

A group computes together, so that its leader stands for all: what holds up one of its followers holds up the worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from deploy.kubernetes.objects import Pod, Pool


def members(pool: Pool, pods: Iterable[Pod]) -> list[Pod]:
    """The workers of a pool."""
    own = [one for one in pods if pool.selector.items() <= one.labels.items()]
    followers: dict[int, list[Pod]] = {}
    for one in own:
        # One that ends may be of the group that was there before.
        if one.follows and one.active:
            followers.setdefault(one.group, []).append(one)
    return [_as_worker(one, followers.get(one.group, ())) for one in own if not one.follows]


def _as_worker(leader: Pod, followers: Sequence[Pod]) -> Pod:
    if not followers:
        return leader
    stuck, since_s = leader.stuck, leader.stuck_since_unix_s
    for one in followers:
        if one.stuck and not stuck:
            stuck, since_s = f"its follower {one.name}: {one.stuck}", one.stuck_since_unix_s
    fallen_s = [one.fell_unix_s for one in (leader, *followers) if one.fell_unix_s]
    return replace(
        leader,
        ready=leader.ready and all(one.ready for one in followers),
        stuck=stuck,
        stuck_since_unix_s=since_s,
        fell_unix_s=min(fallen_s, default=0.0),
        sick=leader.sick or any(one.sick for one in followers),
    )
