"""Where each owner of the block index stands in the router's vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from frontend.depths import Levels
from frontend.owner_sets import MEMBERS_ONE_BY_ONE, members, members_mask

KEPT = 64
"""Sets of which the marks are kept: those of system prompts, which nearly every prompt begins with."""


class OwnerPlaces:
    """By owner, its place, or -1 for none; several owners may share one. Plain data.

    Args:
        places: of the first owners.
    """

    def __init__(self, places: NDArray[np.int64] | None = None) -> None:
        self._place_of = np.full(64, -1) if places is None else places.copy()
        self._marks: dict[int, Levels] = {}
        self._size = 0

    def put(self, owner: int, place: int) -> None:
        """An owner's place from now on."""
        while owner >= len(self._place_of):
            self._place_of = np.concatenate([self._place_of, np.full_like(self._place_of, -1)])
        if self._place_of[owner] != place:
            self._place_of[owner] = place
            self._marks.clear()

    def of(self, mask: int) -> list[int]:
        """The places of a set's owners."""
        place_of = self._place_of.item
        return [place_of(owner) for owner in members(mask)]

    def marks(self, mask: int, size: int) -> Levels:
        """1 at the places of a set's owners and 0 at the rest of so many; one place more is theirs who have none.

        Not to be changed.
        """
        if size != self._size or len(self._marks) > KEPT:
            self._marks.clear()
            self._size = size
        marks = self._marks.get(mask)
        if marks is None:
            marks = self._marks[mask] = np.zeros(size + 1, np.intp)
            marks[self._place_of[members_mask(mask).nonzero()[0]]] = 1
        return marks


def is_small(mask: int) -> bool:
    """Whether a set's owners are better looked at one by one."""
    return mask.bit_count() <= MEMBERS_ONE_BY_ONE
