"""Sets of owners with a small number each, so that a block's owners cost four bytes wherever many share them.

A set is an int with a bit for each owner. Equal sets have one number, and a set whose last block is gone gives its
number back. An owner that goes is struck out of all sets at once by a mask that every reading is under; the sets
themselves are rewritten a few at a time, after which the owner's bit is given to the next one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EMPTY = 0
"""The number of the set of nobody; blocks with it are not kept."""


MEMBERS_ONE_BY_ONE = 12
"""Owners of a set up to which they are found one by one faster than all at once."""


class OwnerSets:
    """Plain data: no clock, no I/O."""

    def __init__(self) -> None:
        self._masks: list[int] = [0]
        self._numbers: dict[int, int] = {0: EMPTY}
        self._blocks: NDArray[np.int64] = np.zeros(64, dtype=np.int64)
        self._vacant: NDArray[np.bool_] = np.zeros(64, dtype=np.bool_)
        self._free: list[int] = []
        self._free_bits: list[int] = []
        self._bits = 0
        self._gone = 0  # owners that left, whose bits may still be in sets
        self._sweeping = 0  # those of them that the sweep under way strikes out
        self._cursor = 1
        self.vacant_blocks = 0  # whose last owner has left

    def __len__(self) -> int:
        return len(self._masks) - len(self._free)

    @property
    def vacant(self) -> NDArray[np.bool_]:
        """By number, whether nobody is left of a set."""
        return self._vacant

    def enter(self) -> int:
        """A new owner: its bit's place."""
        if self._free_bits:
            return self._free_bits.pop()
        self._bits += 1
        return self._bits - 1

    def leave(self, owner: int) -> None:
        """An owner has nothing any more. Its bit is used again after a sweep."""
        self._gone |= 1 << owner

    def mask(self, number: int) -> int:
        """The owners of a set."""
        mask = self._masks[number]
        return mask & ~self._gone if self._gone else mask

    def with_owner(self, number: int, owner: int) -> int:
        """The number of the set with this owner too."""
        return self._number(self.mask(number) | 1 << owner)

    def without_owner(self, number: int, owner: int) -> int:
        """The number of the set without this owner."""
        mask = self._masks[number]
        return self._number(self.mask(number) & ~(1 << owner)) if mask >> owner & 1 else number

    def recount(self, left: NDArray[np.uint32], entered: NDArray[np.uint32], blocks: NDArray[np.int64]) -> None:
        """So many blocks each went from one set to another."""
        np.add.at(self._blocks, entered, blocks)
        self.release(left, blocks)

    def release(self, numbers: NDArray[np.uint32], blocks: NDArray[np.int64]) -> None:
        """So many blocks each have left a set."""
        np.subtract.at(self._blocks, numbers, blocks)
        self._blocks[EMPTY] = 0
        self.vacant_blocks -= int(blocks[self._vacant[numbers]].sum())
        for number in np.unique(numbers[self._blocks[numbers] == 0]).tolist():
            self._give_back(number)

    def sweep(self, sets: int) -> bool:
        """Strike owners that left out of so many sets. Returns whether there is more to do."""
        if not self._sweeping:
            self._sweeping, self._cursor = self._gone, 1
        if not self._sweeping:
            return False
        end = min(self._cursor + sets, len(self._masks))
        for number in range(self._cursor, end):
            if self._masks[number] & self._sweeping:
                self._strike(number)
        self._cursor = end
        if end < len(self._masks):
            return True
        swept, self._sweeping = self._sweeping, 0
        self._gone &= ~swept
        self._free_bits += [bit for bit in range(self._bits) if swept >> bit & 1]
        return self._gone != 0

    def _strike(self, number: int) -> None:
        before = self._masks[number]
        after = before & ~self._gone
        if self._numbers.get(before) == number:
            del self._numbers[before]
        self._masks[number] = after
        if after:
            self._numbers.setdefault(after, number)  # two numbers may mean one set from now on
        elif self._blocks[number]:
            self._vacant[number] = True
            self.vacant_blocks += int(self._blocks[number])

    def _number(self, mask: int) -> int:
        number = self._numbers.get(mask)
        if number is not None:
            return number
        if self._free:
            number = self._free.pop()
            self._masks[number] = mask
        else:
            number = len(self._masks)
            self._masks.append(mask)
            if number >= len(self._blocks):
                self._blocks = np.concatenate([self._blocks, np.zeros_like(self._blocks)])
                self._vacant = np.concatenate([self._vacant, np.zeros_like(self._vacant)])
        self._numbers[mask] = number
        return number

    def _give_back(self, number: int) -> None:
        if number == EMPTY:
            return
        if self._numbers.get(self._masks[number]) == number:
            del self._numbers[self._masks[number]]
        self._masks[number] = 0
        self._vacant[number] = False
        self._free.append(number)


def members(mask: int) -> list[int]:
    """The owners of a set, by rising number."""
    if mask.bit_count() > MEMBERS_ONE_BY_ONE:
        return [int(owner) for owner in np.flatnonzero(members_mask(mask))]
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def members_mask(mask: int) -> NDArray[np.bool_]:
    """By owner, whether it is in a set."""
    octets = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(octets, bitorder="little").view(np.bool_)
