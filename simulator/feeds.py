"""What workers tell the frontends of their model: what their prefix caches hold, and how much they have to do."""

from __future__ import annotations

from collections.abc import Mapping

from simulator.event_loop import EventLoop
from simulator.frontend import SimulatedFrontend
from simulator.members import Members
from simulator.underway import Underway
from simulator.worker import SimulatedWorker
from slipstream.v1.registry_pb2 import Load

FEED_INTERVAL_S = 0.1
"""How often a frontend hears a worker's load; its own requests it knows at once."""


class Feeds:
    """All workers' feeds.

    Args:
        under: all requests that are with workers, by their attempts' ids.
    """

    def __init__(self, loop: EventLoop, members: Members, under: Mapping[str, Underway]) -> None:
        self._loop = loop
        self._members = members
        self._under = under

    def tell(self, worker: SimulatedWorker) -> None:
        """What a worker has to tell after a step."""
        member = self._members.present.get(worker.worker_id)
        if member is None:
            return
        frontends = member.pool.frontends
        worker.catch_up()
        stored, removed = worker.scheduler.drain_cache_events()
        if stored or removed:
            for frontend in frontends:
                frontend.hear_cache(worker.worker_id, stored, removed)
        now_s = self._loop.now_s
        if now_s - worker.fed_s < FEED_INTERVAL_S:
            return
        worker.fed_s = now_s
        load = worker.scheduler.load()
        said = Load(
            running=load.running,
            waiting=load.waiting,
            blocks_used=load.blocks_used,
            waiting_tokens=load.waiting_tokens,
            context_tokens=load.context_tokens,
        )
        for frontend in frontends:
            own = said if len(frontends) == 1 else self._own(worker, frontend)
            frontend.hear_load(worker.worker_id, said, own, now_s)

    def _own(self, worker: SimulatedWorker, frontend: SimulatedFrontend) -> Load:
        mine = [
            one
            for one in self._under.values()
            if one.frontend is frontend and worker in (one.prefill, one.decode) and one.journey.ended_s < 0
        ]
        waiting = sum(one.journey.arrival.input_tokens for one in mine if one.journey.computed_s < 0)
        context = sum(one.journey.arrival.input_tokens for one in mine if one.decode is worker)
        return Load(running=len(mine), waiting_tokens=waiting, context_tokens=context)
