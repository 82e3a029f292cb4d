"""A worker tells its watchers what is in its prefix cache and how busy it is: everything first, then what changes.

Each watcher has a list of changes not yet sent, by key, in which a later one replaces an earlier one. It cannot grow
beyond what is in the cache: a watcher that reads too slowly for that gets everything anew. What changes between two
updates travels together; an idle worker sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from engine.open_work import OpenWork
from engine.protocol import CacheChange, Engine
from slipstream.v1.registry_pb2 import Load
from slipstream.v1.worker_pb2 import CacheUpdate, Tier

MIN_INTERVAL_S = 0.02
LOAD_INTERVAL_S = 0.25
"""How often growth that nothing announces is looked for (sequences get longer) while requests are open."""

UPDATE_KEYS = 1 << 12
"""Keys of one update, which a frontend takes in some milliseconds; a snapshot with more is followed by others."""

MIN_PENDING = 4096


class _Watcher:
    """What one watcher has not been sent yet."""

    def __init__(self) -> None:
        self.snapshot = True
        self.changes: dict[Tier.ValueType, dict[int, bool]] = {}  # by tier and key: stored, or removed
        self.awake = asyncio.Event()

    def note(self, change: CacheChange, limit: int) -> None:
        self.awake.set()
        if self.snapshot:
            return
        pending = self.changes.setdefault(change.tier, {})
        pending.update(dict.fromkeys(change.removed, False))
        pending.update(dict.fromkeys(change.stored, True))
        if change.reset or sum(map(len, self.changes.values())) > limit:
            self.snapshot = True
            self.changes.clear()


class CacheFeed:
    """Behind Worker.WatchCache. `follow` must run.

    Args:
        model: the served name; it is part of the blocks' keys.
        epoch: of this worker.
        profile: JSON of a slipstream.performance.Profile, or nothing.
    """

    def __init__(self, engine: Engine, work: OpenWork, *, model: str, epoch: int, profile: bytes = b"") -> None:
        self._engine = engine
        self._work = work
        self._epoch = epoch
        self._profile = profile
        self._watchers: set[_Watcher] = set()
        self._blocks: dict[Tier.ValueType, set[int]] = {Tier.TIER_DEVICE: set()}
        self._closed = False
        self._changes = engine.cache_changes()
        work.changed = self._wake
        if self._changes is not None:
            work.know(model, engine.capacity().block_tokens, self._blocks[Tier.TIER_DEVICE])

    @property
    def watchers(self) -> int:
        """How many there are now."""
        return len(self._watchers)

    async def follow(self) -> None:
        """Take what the engine tells. Runs until cancelled, or until the engine has no more to say."""
        if self._changes is not None:
            async for change in self._changes:
                self._take(change)

    def close(self) -> None:
        """End all watches."""
        self._closed = True
        self._wake()

    async def updates(self, frontend_id: str, interval_s: float) -> AsyncGenerator[CacheUpdate, None]:
        """What one watcher is sent, until it goes or the feed is closed.

        Args:
            frontend_id: whose part of the load is told beside the whole.
            interval_s: updates come no faster than this, or than `MIN_INTERVAL_S`.
        """
        with self._watched() as watcher:
            sequence, load = 0, None
            while not self._closed:
                watcher.awake.clear()
                now = self._work.load(self._engine.load())
                for update in self._due(watcher, now if now != load else None, frontend_id):
                    update.epoch, update.sequence = self._epoch, sequence
                    if sequence == 0:
                        update.profile = self._profile
                    sequence += 1
                    yield update
                still, load = now == load, now
                if not self._closed:
                    await asyncio.sleep(max(interval_s, MIN_INTERVAL_S))
                    await self._until_awake(watcher, None if still and not len(self._work) else LOAD_INTERVAL_S)

    @contextmanager
    def _watched(self) -> Iterator[_Watcher]:
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def _until_awake(self, watcher: _Watcher, limit_s: float | None) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await watcher.awake.wait()
        except TimeoutError:
            return

    def _due(self, watcher: _Watcher, load: Load | None, frontend_id: str) -> Iterator[CacheUpdate]:
        """The updates that are due. All of them are taken from the state of this moment, however long they are read."""
        snapshot, watcher.snapshot = watcher.snapshot, False
        changes, watcher.changes = watcher.changes, {}
        if snapshot:
            changes = {tier: dict.fromkeys(keys, True) for tier, keys in self._blocks.items()}
        parts = [
            (tier, part)
            for tier, pending in changes.items()
            for part in _parts([key for key, stored in pending.items() if stored], pending)
        ]
        if not parts and (load is not None or snapshot):
            parts = [(Tier.TIER_DEVICE, ([], []))]
        known = self._changes is not None
        own = self._work.load(Load(), of=frontend_id) if load is not None else None
        for number, (tier, (stored, removed)) in enumerate(parts):
            first = number == 0
            yield CacheUpdate(
                snapshot=snapshot and first,
                stored=stored,
                removed=removed,
                tier=tier,
                blocks_known=known,
                load=load if first else None,
                own=own if first else None,
            )

    def _take(self, change: CacheChange) -> None:
        if change.reset:
            for keys in self._blocks.values():
                keys.clear()
        blocks = self._blocks.setdefault(change.tier, set())
        blocks.difference_update(change.removed)
        blocks.update(change.stored)
        limit = max(MIN_PENDING, sum(map(len, self._blocks.values())))
        for watcher in self._watchers:
            watcher.note(change, limit)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.awake.set()


def _parts(stored: list[int], pending: dict[int, bool]) -> Iterator[tuple[list[int], list[int]]]:
    """Pieces of what is pending: (stored, removed)."""
    removed = [key for key, is_stored in pending.items() if not is_stored]
    for start in range(0, max(len(stored), len(removed)), UPDATE_KEYS):
        yield stored[start : start + UPDATE_KEYS], removed[start : start + UPDATE_KEYS]
