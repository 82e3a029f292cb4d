"""What each worker's feed has told this frontend: its blocks, its load, how fast it is.

Updates go in, the router's questions are answered. A worker that was restarted, or tells everything anew, is another
owner in the index, so that what it had before is forgotten at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from frontend.block_index import BlockIndex
from frontend.depths import Depths
from frontend.owner_places import OwnerPlaces
from frontend.signs_of_life import SignsOfLife
from slipstream import telemetry
from slipstream.performance import Profile, decode_profile
from slipstream.v1.registry_pb2 import Load
from slipstream.v1.worker_pb2 import CacheUpdate, Tier

log = telemetry.get_logger(__name__)


class LoadListener(Protocol):
    """Who wants to know of loads and profiles as they come; `frontend.router.Fleet` does."""

    def note_load(self, worker_id: str, load: Load, own: Load, now_s: float) -> None:
        """What a worker does now, and what of that is for this frontend."""

    def note_profile(self, worker_id: str, profile: Profile | None) -> None:
        """How fast a worker is, by its own word."""

    def lose_feed(self, worker_id: str) -> None:
        """Nothing comes from a worker's feed any more."""


@dataclass(slots=True)
class KnownWorker:
    """What is known of one worker.

    Attributes:
        epoch: of the incarnation that told it.
        tells_blocks: whether the index knows what it has; if not, that can only be guessed.
        load, own: as of its last word; None before.
        owners: its numbers in the index, by tier.
    """

    epoch: int
    tells_blocks: bool = False
    load: Load | None = None
    own: Load = field(default_factory=Load)
    profile: Profile | None = None
    owners: dict[Tier.ValueType, int] = field(default_factory=dict)


class KnownCaches:
    """Plain data: no clock, no I/O."""

    def __init__(self, listener: LoadListener | None = None) -> None:
        self.index = BlockIndex()
        self.signs = SignsOfLife()
        self._listener = listener
        self._workers: dict[str, KnownWorker] = {}
        self._names: dict[int, str] = {}  # by owner
        self._slots: dict[str, int] = {}
        self._places = OwnerPlaces()

    def get(self, worker_id: str) -> KnownWorker | None:
        """What is known of a worker."""
        return self._workers.get(worker_id)

    def tells_blocks(self, worker_id: str, epoch: int) -> bool:
        """Whether the index knows what this incarnation of a worker has."""
        worker = self._workers.get(worker_id)
        return worker is not None and worker.epoch == epoch and worker.tells_blocks

    def blocks(self, keys: Sequence[int]) -> dict[str, int]:
        """By worker id, how many blocks of a chain it has from the beginning, in any tier."""
        found: dict[str, int] = {}
        for owner, blocks in self.index.match(keys).by_owner().items():
            name = self._names[owner]
            found[name] = max(blocks, found.get(name, 0))
        return found

    def place(self, slots: Mapping[str, int]) -> None:
        """The places that `blocks_by_slot` gives to workers from now on."""
        self._slots = dict(slots)
        for owner, name in self._names.items():
            self._places.put(owner, self._slots.get(name, -1))

    def blocks_by_slot(self, keys: Sequence[int], slots: int) -> Depths | None:
        """`blocks` by slot, with one place more for workers without; None when nobody has any."""
        match = self.index.match(keys)
        return match.spread(slots, self._places) if match.parts else None

    def apply(self, worker_id: str, update: CacheUpdate, now_s: float) -> None:
        """A worker's next update."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.epoch != update.epoch:
            self.forget(worker_id)
            worker = self._workers[worker_id] = KnownWorker(update.epoch)
        elif update.snapshot:
            self._leave(worker)
        worker.tells_blocks = update.blocks_known
        if worker.tells_blocks:
            self.signs.begins(worker_id, now_s)
            if update.stored:
                self.signs.computed(worker_id, now_s)
        if update.stored or update.removed:
            owner = self._owner(worker_id, worker, update.tier)
            self.index.remove(owner, _array(update.removed))
            self.index.store(owner, _array(update.stored))
        if update.profile:
            self._take_profile(worker_id, worker, update.profile)
        if update.HasField("load"):
            worker.load, worker.own = update.load, update.own
            if self._listener is not None:
                self._listener.note_load(worker_id, update.load, update.own, now_s)

    def lost(self, worker_id: str) -> None:
        """A worker's feed broke. Its blocks are kept until it tells anew: most of them will still be there."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.load = None
            if self._listener is not None:
                self._listener.lose_feed(worker_id)

    def forget(self, worker_id: str) -> None:
        """A worker is gone, and everything it had with it."""
        self.signs.forget(worker_id)
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self._leave(worker)

    def _owner(self, worker_id: str, worker: KnownWorker, tier: Tier.ValueType) -> int:
        owner = worker.owners.get(tier)
        if owner is None:
            owner = worker.owners[tier] = self.index.enter()
            self._names[owner] = worker_id
            self._places.put(owner, self._slots.get(worker_id, -1))
        return owner

    def _leave(self, worker: KnownWorker) -> None:
        for owner in worker.owners.values():
            self.index.leave(owner)
            del self._names[owner]
        worker.owners.clear()

    def _take_profile(self, worker_id: str, worker: KnownWorker, content: bytes) -> None:
        try:
            worker.profile = decode_profile(content)
        except msgspec.MsgspecError as error:
            log.warning("profile_not_understood", worker_id=worker_id, reason=str(error))
            return
        if self._listener is not None:
            self._listener.note_profile(worker_id, worker.profile)


def _array(keys: Iterable[int]) -> NDArray[np.uint64]:
    return np.fromiter(keys, dtype=np.uint64)
