"""One worker as the pool knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from slipstream.v1.registry_pb2 import Role


@dataclass(slots=True, eq=False)
class PoolWorker:
    """One worker that shall be there, or is on its way to its end.

    Attributes:
        role: that it has, as far as it is known here.
        must: it is placed again and again until there is room; a planner's wish is dropped instead.
        replaces: the worker on a draining node whose place it takes.
        node_id: empty while it has no place.
        ready: the registry has had it as ready.
        reserved: done once it has a place, or has failed to get one.
        lost: set to have it taken for dead.
    """

    worker_id: str
    role: Role.ValueType
    ordered_unix_s: float
    must: bool = True
    replaces: str = ""
    node_id: str = ""
    ready: bool = False
    ending: bool = False
    reserved: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
