"""How deep each worker has one prompt: few different depths, and which of them is whose.

A prompt's blocks are had to a handful of depths, however many workers there are. So whatever follows from a depth,
such as the time to compute the rest, is reckoned once for each depth and not for each worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.intp]
"""Positions in a list of depths."""


@dataclass(slots=True)
class Depths:
    """Plain data.

    Attributes:
        depths: blocks, or tokens, from the prompt's beginning; the first one is 0.
        levels: by place, which of `depths`.
    """

    depths: tuple[int, ...]
    levels: Levels

    @classmethod
    def of(cls, by_place: Mapping[int, int], places: int) -> Depths:
        """Of single depths by place; nothing for the rest of so many places."""
        return cls((0,), np.zeros(places, np.intp)).with_(by_place)

    def with_(self, by_place: Mapping[int, int]) -> Depths:
        """With other depths at some places."""
        depths, levels = [*self.depths], self.levels.copy()
        for place, depth in by_place.items():
            levels[place] = len(depths)
            depths.append(depth)
        return Depths(tuple(depths), levels)

    def times(self, factor: int) -> Depths:
        """Blocks as tokens."""
        return Depths(tuple([factor * depth for depth in self.depths]), self.levels)

    def at(self, place: int) -> int:
        """The depth at one place."""
        return self.depths[self.levels.item(place)]
