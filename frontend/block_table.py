"""A hash table from 64-bit block keys to 32-bit numbers, in numpy arrays: 12 bytes a slot, no object an entry.

Open addressing with linear probing; the keys are hashes already (slipstream.block_keys), so a key's low bits are
its place. A removed entry keeps its key with number 0, so that those behind it are still found; such a slot is taken
again by whatever is inserted next to it.

A table that is too full is moved to another one a piece at a time (as Redis does): both are searched meanwhile, and
every change moves a bounded number of slots, so that no single call pays for the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Numbers = NDArray[np.uint32]
Places = NDArray[np.int64]
"""Where keys were found: a slot of the table; `-2 - slot` of the one that is being left; -1 for nowhere."""

MIN_SLOTS = 1 << 10
MAX_USED_SHARE = 0.65
MOVED_SLOTS = 2048
"""Slots of the old table that a change moves at least."""

MOVED_SLOTS_EACH = 8
"""Slots moved for each changed key at least: the old table is empty long before the new one is full."""

NOWHERE = -1


def _zeros(size: int, dtype: type[Any]) -> NDArray[Any]:
    """Zeros in small pages, each taken when it is written. numpy's own come in pages of 2 MiB where the kernel has
    them: the first few hundred keys in a large new table would each wait for one to be cleared (0.3 s were seen)."""
    return np.frombuffer(mmap(-1, size * np.dtype(dtype).itemsize), dtype=dtype)


@dataclass(slots=True)
class _Slots:
    keys: Keys
    numbers: Numbers
    mask: int
    key_at: Any  # memoryviews of the two arrays: a single item is read in a third of the time
    number_at: Any
    used: int = 0  # slots with a key, removed ones too

    @classmethod
    def empty(cls, slots: int) -> _Slots:
        keys, numbers = _zeros(slots, np.uint64), _zeros(slots, np.uint32)
        return cls(keys, numbers, slots - 1, memoryview(keys.data), memoryview(numbers.data))

    def find(self, key: int) -> int:
        """The slot of one key, or -1."""
        key_at, mask = self.key_at, self.mask
        slot = key & mask
        while (found := key_at[slot]) != key:
            if found == 0:
                return -1
            slot = (slot + 1) & mask
        return slot

    def find_many(self, keys: Keys) -> Places:
        """The slots of many keys; -1 for those that are not there."""
        mask = np.int64(self.mask)
        slots = (keys & np.uint64(self.mask)).astype(np.int64)
        found = self.keys[slots]
        open_ = np.flatnonzero((found != keys) & (found != 0))
        places = np.where(found == keys, slots, NOWHERE)
        while len(open_):
            slots[open_] = (slots[open_] + 1) & mask
            found = self.keys[slots[open_]]
            hit = found == keys[open_]
            places[open_[hit]] = slots[open_[hit]]
            open_ = open_[~hit & (found != 0)]
        return places

    def insert(self, keys: Keys, numbers: Numbers) -> None:
        """Add different keys that are not there."""
        mask = np.int64(self.mask)
        slots = (keys & np.uint64(self.mask)).astype(np.int64)
        while len(keys):
            free = self.numbers[slots] == 0
            at, wanted = slots[free], keys[free]
            fresh = self.keys[at] == 0
            self.keys[at] = wanted
            won = self.keys[at] == wanted  # of several that took the same slot, the last one
            self.used += int(np.count_nonzero(fresh & won))
            self.numbers[at[won]] = numbers[free][won]
            left = ~free
            left[np.flatnonzero(free)[~won]] = True
            keys, numbers, slots = keys[left], numbers[left], (slots[left] + 1) & mask


class BlockTable:
    """See the module. Numbers are 1 and above; 0 says that a key is not there."""

    def __init__(self) -> None:
        self._now = _Slots.empty(MIN_SLOTS)
        self._old: _Slots | None = None
        self._moved = 0  # slots of the old table that have been moved
        self.count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(one.keys.nbytes + one.numbers.nbytes for one in (self._now, self._old) if one is not None)

    @property
    def moving(self) -> bool:
        """Whether entries are being moved to another table."""
        return self._old is not None

    def get(self, key: int) -> int:
        """The number of a key, or 0."""
        key = key or 1
        now = self._now
        key_at, mask = now.key_at, now.mask
        slot = key & mask
        while (found := key_at[slot]) != key:  # as `find`: this is called twenty times for each prompt
            if found == 0:
                break
            slot = (slot + 1) & mask
        else:
            if number := now.number_at[slot]:
                return number  # type: ignore[no-any-return]  # an item of a memoryview
        if self._old is not None and (slot := self._old.find(key)) >= 0:
            return int(self._old.number_at[slot])
        return 0

    def locate(self, keys: Keys) -> tuple[Numbers, Places]:
        """The numbers of keys, 0 for those that are not there, and where to `put` others."""
        places = self._now.find_many(keys)
        numbers = np.where(places >= 0, self._now.numbers[places], np.uint32(0))
        if self._old is not None:
            missing = np.flatnonzero(numbers == 0)
            there = self._old.find_many(keys[missing])
            found = np.where(there >= 0, self._old.numbers[there], np.uint32(0))
            live = found != 0
            numbers[missing[live]] = found[live]
            places[missing[live]] = -2 - there[live]
        return numbers, places

    def put(self, keys: Keys, places: Places, before: Numbers, numbers: Numbers) -> None:
        """Give different keys new numbers; 0 removes one.

        Args:
            places, before: what `locate` said of these keys, with no change in between.
        """
        here, there = places >= 0, places < NOWHERE
        self._now.numbers[places[here]] = numbers[here]
        if self._old is not None:
            self._old.numbers[-2 - places[there]] = numbers[there]
        new = (places == NOWHERE) & (numbers != 0)
        self.count += int(np.count_nonzero(numbers)) - int(np.count_nonzero(before))
        if new.any():
            self._now.insert(keys[new], numbers[new])

    def make_room(self, keys: int, gone: NDArray[np.bool_]) -> Numbers:
        """Before so many keys are put: start, or go on with, a move where it is time.

        Args:
            gone: by number, whether entries with it need not be moved.

        Returns:
            The numbers of the entries that were left behind so; one entry each.
        """
        if self._old is None and self._now.used + keys > MAX_USED_SHARE * (self._now.mask + 1):
            self.start_move(keys)
        return self.move(max(MOVED_SLOTS, MOVED_SLOTS_EACH * keys), gone)

    def start_move(self, room: int = 0) -> None:
        """Begin to leave this table for one of the size that its entries, and as many as `room`, need."""
        if self._old is not None:
            return
        slots = MIN_SLOTS
        while slots * MAX_USED_SHARE < 1.5 * (self.count + room):
            slots *= 2
        self._old, self._now, self._moved = self._now, _Slots.empty(slots), 0

    def move(self, slots: int, gone: NDArray[np.bool_]) -> Numbers:
        """Move entries of so many slots; see `make_room`."""
        old = self._old
        if old is None:
            return np.empty(0, dtype=np.uint32)
        end = min(self._moved + slots, old.mask + 1)
        numbers = old.numbers[self._moved : end]
        live = np.flatnonzero(numbers)
        dropped = gone[numbers[live]]
        left_behind = numbers[live[dropped]].copy()
        kept = live[~dropped]
        if len(kept):
            self._now.insert(old.keys[self._moved : end][kept], numbers[kept].copy())
        numbers[:] = 0
        self.count -= len(left_behind)
        self._moved = end
        if end == old.mask + 1:
            self._old = None
        return left_behind
