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

import numpy as np
from numpy.typing import NDArray

from frontend.block_table import BlockTable
from frontend.depths import Depths
from frontend.owner_places import OwnerPlaces, is_small
from frontend.owner_sets import OwnerSets, members

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

_FAR = 256
_DOUBLED = 8 * 1024
_MANY = 8
_Changed = Callable[[int, int], int]


@dataclass(slots=True)
class Match:
    """How much of a chain the owners have.

    Attributes:
        parts: (blocks from the beginning, the owners that have so many or more, as bits); by rising blocks.
    """

    parts: Sequence[tuple[int, int]] = ()

    def by_owner(self) -> dict[int, int]:
        """Blocks by owner."""
        return {owner: blocks for blocks, mask in self.parts for owner in members(mask)}

    def spread(self, size: int, places: OwnerPlaces) -> Depths:
        """Blocks by place, of so many places; one place more is theirs who have none.

        Where several owners share a place, the one with the most blocks counts.
        """
        if not self.parts:
            return Depths((0,), np.zeros(size + 1, np.intp))
        parts = iter(self.parts)
        blocks, mask = next(parts)
        depths, levels = [0, blocks], places.marks(mask, size).copy()
        for level, (blocks, mask) in enumerate(parts, start=2):
            depths.append(blocks)
            if is_small(mask):
                for place in places.of(mask):
                    levels[place] = level
            else:
                np.maximum(levels, places.marks(mask, size) * level, out=levels)
        return Depths(tuple(depths), levels)


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
        # From a block to a later one with other owners; beyond the end nobody has anything.
        end, ranges = len(keys), [(0, first, len(keys), 0)]
        probes, get, mask = 1, self._table.get, self._sets.mask
        while ranges:
            halves = []
            # Where there are many, the widest first: looking may end before all are told apart.
            narrow = max(high - low for low, _, high, _ in ranges) >> 1 if len(ranges) > _MANY else 0
            for low, at_low, high, at_high in ranges:
                if high - low == 1 or probes >= MAX_PROBES:
                    parts.append((low + 1, at_low))
                    continue
                if high - low <= narrow:
                    halves.append((low, at_low, high, at_high))
                    continue
                # In a long prompt doubling from the beginning, of which most have no more; else the middle.
                middle = (low + high) >> 1
                if high == end and high - low > _FAR and low < _DOUBLED:
                    middle = min(middle, 2 * low + 2)
                at_middle = mask(get(keys[middle])) & at_low
                probes += 1
                if at_middle != at_low:
                    halves.append((low, at_low, middle, at_middle))
                if at_middle != at_high:
                    halves.append((middle, at_middle, high, at_high))
            ranges = halves
        parts.sort()
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
