"""A place for each worker of the pool. Nodes are chosen for one after the other: each sees the choices before it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import replace

from deploy.ray.nodes import RayNode
from deploy.ray.orders import Orders
from deploy.ray.placement import choose_node
from deploy.ray.places import Places
from deploy.ray.pool_worker import PoolWorker
from slipstream import telemetry
from slipstream.errors import UnavailableError

log = telemetry.get_logger(__name__)


class Placing:
    """Chooses nodes and has the places made. Nothing new is put on a node whose device is sick."""

    def __init__(self, places: Places, orders: Orders) -> None:
        self._places = places
        self._bundle = orders.bundle
        self._timeout_s = orders.settings.ray.place_timeout_s
        self._choosing = asyncio.Lock()
        self._sick: dict[str, str] = {}

    def bar(self, node_id: str, why: str) -> None:
        """Put nothing new on this node; what is there is somebody else's to end."""
        if node_id and node_id not in self._sick:
            self._sick[node_id] = why
            log.warning("node_barred", node=node_id, reason=why)

    async def place(self, worker: PoolWorker, there: Iterable[PoolWorker]) -> None:
        """Give the worker a place, and note its node, as far as it is known.

        Args:
            there: all workers that stay.

        Raises:
            UnavailableError: no node has had room within `ray.place_timeout_s`.
        """
        try:
            nodes = await self._choose(worker, there)
            chosen = worker.node_id or None
            worker.node_id = await self._places.place(worker.worker_id, self._bundle, nodes, chosen, self._timeout_s)
        except UnavailableError:
            worker.node_id = ""
            raise

    async def _choose(self, worker: PoolWorker, there: Iterable[PoolWorker]) -> list[RayNode]:
        async with self._choosing:
            nodes = [self._as_known(node) for node in await self._places.nodes()]
            placed = [(one.node_id, one.role) for one in there if one.node_id and one is not worker]
            worker.node_id = choose_node(nodes, self._bundle, worker.role, placed) or ""
            return nodes

    def _as_known(self, node: RayNode) -> RayNode:
        """A node with a sick device is taken for one that is about to go: Ray may give out the same device again."""
        return replace(node, gone_at_s=math.inf) if node.node_id in self._sick and node.stays else node
