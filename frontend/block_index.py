"""Which worker has which KV blocks, in which tier: what the router asks for every prompt.

Filled from the workers' feeds (frontend.cache_watch), by the keys of slipstream.block_keys. A block costs a slot of
`frontend.block_table`; who has it is a number of `frontend.owner_sets`, since most blocks are shared by few
workers and in the same way as their neighbours.

A prompt's blocks are not all looked up. An engine drops the end of a sequence before its beginning, so whoever has
a block has the ones before it: the set of owners only shrinks along a chain, and the places where it does are found
by bisection. A worker for which this does not hold for a moment is estimated wrong by some blocks, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from frontend.block_table import BlockTable
from frontend.owner_sets import OwnerSets

MAX_PROBES = 160
"""Blocks of one prompt looked up at most; beyond that some owners are taken to have less than they do."""

SWEPT_SETS = 64
"""Owner sets rewritten with each change while owners that left are struck out."""

TIDY_SLOTS = 1 << 13
TIDY_SETS = 1 << 11
VACANT_SHARE = 0.25
"""Share of entries without an owner from which on the table is moved, which leaves them behind."""

BATCH = 1 << 12
"""Keys of one change applied at a time."""

_FEW = 12
_Changed = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a chain the owners have.

    Attributes:
        parts: (blocks from the beginning, the owners that have just so many, as bits); by falling blocks.
    """

    parts: Sequence[tuple[int, int]] = ()

    def by_owner(self) -> dict[int, int]:
        """Blocks by owner."""
        return {owner: blocks for blocks, mask in self.parts for owner in members(mask)}

    def spread(self, size: int, place_of: NDArray[np.int64]) -> NDArray[np.int32]:
        """Blocks as a vector of so many places, and one more for owners without a place.

        Args:
            place_of: by owner, its place, or -1; where several owners share one, the one with the most blocks counts.
        """
        found = np.zeros(size + 1, dtype=np.int32)
        for blocks, mask in reversed(self.parts):
            found[place_of[members(mask) if mask.bit_count() <= _FEW else _places(mask)]] = blocks
        return found


class BlockIndex:
    """Block key -> owners. An owner is a number from `enter`: one tier of one incarnation of a worker.

    Plain data: no clock, no I/O. A change of n blocks costs time in proportion to n, with a bound on what it
    pays for growth; `tidy` does what is left over, when nothing else is to be done.
    """

    def __init__(self) -> None:
        self._table = BlockTable()
        self._sets = OwnerSets()

    def __len__(self) -> int:
        """Different blocks that somebody has; those of an owner that left count until `tidy` is through."""
        return self._table.count - self._sets.vacant_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of the table's arrays; the owner sets come on top."""
        return self._table.nbytes

    @property
    def owner_sets(self) -> int:
        """Different sets of owners that occur."""
        return len(self._sets)

    def enter(self) -> int:
        """A new owner, which has nothing yet."""
        return self._sets.enter()

    def leave(self, owner: int) -> None:
        """Forget all that an owner has, at once; do not use its number any more."""
        self._sets.leave(owner)

    def store(self, owner: int, keys: NDArray[np.uint64]) -> None:
        """An owner has these blocks now; those that it had already may be among them."""
        self._change(owner, keys, self._sets.with_owner)

    def remove(self, owner: int, keys: NDArray[np.uint64]) -> None:
        """An owner does not have these any more; some that it never had may be among them."""
        self._change(owner, keys, self._sets.without_owner)

    def owners(self, key: int) -> int:
        """Who has one block, as bits."""
        return self._sets.mask(self._table.get(key))

    def match(self, keys: Sequence[int]) -> Match:
        """By owner, how many blocks of a chain it has from the beginning. Looks at `MAX_PROBES` blocks at most."""
        if not keys or not (first := self.owners(keys[0])):
            return Match()
        parts: list[tuple[int, int]] = []
        # Ranges, the widest first: from a block to a later one with other owners; beyond the end nobody has anything.
        ranges = [(-len(keys), 0, first, len(keys), 0)]
        probes = 1
        while ranges:
            _, low, at_low, high, at_high = heappop(ranges)
            if high - low == 1 or probes >= MAX_PROBES:
                parts.append((low + 1, at_low & ~at_high))
                continue
            middle = _middle(low, high, len(keys))
            at_middle = self.owners(keys[middle]) & at_low
            probes += 1
            if at_middle != at_low:
                heappush(ranges, (low - middle, low, at_low, middle, at_middle))
            if at_middle != at_high:
                heappush(ranges, (middle - high, middle, at_middle, high, at_high))
        parts.sort(key=lambda part: -part[0])
        return Match(parts)

    def tidy(self) -> bool:
        """Do a bounded piece of what growth and leaving owners left over. Returns whether there is more."""
        table, sets = self._table, self._sets
        if sets.sweep(TIDY_SETS):
            return True
        if not table.moving and sets.vacant_blocks > max(1024, VACANT_SHARE * table.count):
            table.start_move()
        self._release(table.move(TIDY_SLOTS, sets.vacant))
        return table.moving

    def _change(self, owner: int, keys: NDArray[np.uint64], changed: _Changed) -> None:
        for start in range(0, len(keys), BATCH):
            self._change_batch(owner, keys[start : start + BATCH], changed)

    def _change_batch(self, owner: int, keys: NDArray[np.uint64], changed: _Changed) -> None:
        table, sets = self._table, self._sets
        keys = np.unique(keys)
        if keys[0] == 0:  # an empty slot's mark
            keys[0] = 1
            keys = np.unique(keys)
        sets.sweep(SWEPT_SETS)
        self._release(table.make_room(len(keys), sets.vacant))
        before, places = table.locate(keys)
        if (before == before[0]).all():  # the blocks of one prompt, mostly
            number = int(before[0])
            left, counts = before[:1], np.array([len(keys)])
            entered = np.array([changed(number, owner)], dtype=np.uint32)
            after = np.broadcast_to(entered, before.shape)
        else:
            left, inverse, counts = np.unique(before, return_inverse=True, return_counts=True)
            entered = np.array([changed(number, owner) for number in left.tolist()], dtype=np.uint32)
            after = entered[inverse]
        table.put(keys, places, before, after)
        moved = left != entered
        sets.recount(left[moved], entered[moved], counts[moved])

    def _release(self, numbers: NDArray[np.uint32]) -> None:
        if len(numbers):
            self._sets.release(*np.unique(numbers, return_counts=True))


def members(mask: int) -> list[int]:
    """The owners of a set, by rising number."""
    if mask.bit_count() <= _FEW:
        found = []
        while mask:
            low = mask & -mask
            found.append(low.bit_length() - 1)
            mask ^= low
        return found
    return [int(owner) for owner in _places(mask)]


def _places(mask: int) -> NDArray[np.int64]:
    octets = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))


def _middle(low: int, high: int, end: int) -> int:
    """Where to look next: doubling from the beginning while the end is not known to be near, then the middle."""
    if high == end and low < 8 * 1024:
        return min((low + 1) * 2, (low + high + 1) // 2)
    return (low + high) // 2
