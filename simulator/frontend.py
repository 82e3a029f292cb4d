"""A frontend in virtual time: its view of one model's workers, its router, and the index of what they have cached."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from frontend.block_index import BlockIndex
from frontend.owner_places import OwnerPlaces
from frontend.router.ask import Ask
from frontend.router.fleet import Fleet
from frontend.router.learning import AnswerLengths
from frontend.router.route import Route
from simulator.gate import SimulatedGate
from simulator.traces import Arrival
from slipstream.performance import Profile
from slipstream.v1.registry_pb2 import Load, WorkerRecord


class Policy(Protocol):
    """What decides; the live frontend's policies are of this shape."""

    def choose(self, ask: Ask, fleet: Fleet, now_s: float) -> Route: ...


class SimulatedFrontend:
    """One frontend of one model.

    Attributes:
        gate: admission in front of the dispatch; None: everything goes to the workers at once.
    """

    __slots__ = ("_owners", "_places", "fleet", "gate", "index", "lengths", "model", "policy")

    def __init__(self, model: str, policy: Policy, name: str) -> None:
        self.model = model
        self.policy = policy
        self.fleet = Fleet(name)
        self.index = BlockIndex()
        self.lengths = AnswerLengths()
        self.gate: SimulatedGate | None = None
        self._owners: dict[str, int] = {}
        self._places = OwnerPlaces()

    def put(self, record: WorkerRecord, profile: Profile) -> None:
        """A worker is there, or says something new of itself."""
        worker_id = record.worker_id
        one = self.fleet.put(record)
        self.fleet.note_profile(worker_id, profile)
        owner = self._owners.get(worker_id)
        if owner is None:
            owner = self._owners[worker_id] = self.index.enter()
        self._places.put(owner, one.slot)

    def remove(self, worker_id: str) -> None:
        """A worker is gone, and all that it had cached."""
        if worker_id not in self._owners:
            return
        owner = self._owners.pop(worker_id)
        self.fleet.remove(worker_id)
        self.index.leave(owner)
        self._places.put(owner, -1)
        while self.index.tidy():
            pass

    def hear_cache(self, worker_id: str, stored: list[int], removed: list[int]) -> None:
        """A worker's prefix cache has changed."""
        owner = self._owners.get(worker_id)
        if owner is None:
            return
        if removed:
            self.index.remove(owner, np.array(removed, np.uint64))
        if stored:
            self.index.store(owner, np.array(stored, np.uint64))

    def hear_load(self, worker_id: str, load: Load, own: Load, now_s: float) -> None:
        """What a worker says that it does, and what of that is this frontend's."""
        self.fleet.note_load(worker_id, load, own, now_s)

    def ask(self, arrival: Arrival, tokens: int, block_tokens: int) -> Ask:
        """For the router; `tokens`: of the prompt, and what was generated already."""
        match = self.index.match(arrival.keys)
        known = match.spread(self.fleet.slots, self._places).times(block_tokens) if match.parts else None
        return Ask(
            self.model,
            tokens,
            known_by_slot=known,
            session=arrival.session,
            expected_tokens=self.lengths.of(self.model),
        )
