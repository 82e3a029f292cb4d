"""Which pieces of a prompt's KV cache are meant: runs of blocks in runs of regions, and how they are cut up.

A piece is one block (by its index in the prompt) in one region (a layer, or half of one). An extent is a rectangle of
pieces. A prompt's computation finishes extents: some blocks of one layer after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Extent(NamedTuple):
    """Blocks [first, end) in regions [region, region_end)."""

    first: int
    end: int
    region: int
    region_end: int

    @property
    def pieces(self) -> int:
        return max(0, self.end - self.first) * max(0, self.region_end - self.region)

    def clip(self, first: int, end: int) -> Extent:
        """The part of it within blocks [first, end)."""
        return Extent(max(self.first, first), min(self.end, end), self.region, self.region_end)

    def each(self) -> Iterator[tuple[int, int]]:
        """(region, block) of every piece, region by region."""
        return ((region, block) for region in range(self.region, self.region_end) for block in range(*self[:2]))


def joined(a: Extent, b: Extent) -> Extent | None:
    """Both as one extent, when `b` continues `a`."""
    if (a.first, a.end) == (b.first, b.end) and a.region_end == b.region:
        return Extent(a.first, a.end, a.region, b.region_end)
    if (a.region, a.region_end) == (b.region, b.region_end) and a.end == b.first:
        return Extent(a.first, b.end, a.region, a.region_end)
    return None


def cut(extent: Extent, piece_bytes: Sequence[int], limit_bytes: int) -> Iterator[Extent]:
    """Parts of at most `limit_bytes`, or of one piece where that is larger.

    Whole regions first: what is adjacent in the KV cache stays together.

    Args:
        piece_bytes: of one block, for each region.
    """
    blocks = extent.end - extent.first
    region = extent.region
    while region < extent.region_end and blocks > 0:
        size = blocks * piece_bytes[region]
        if size > limit_bytes:
            step = max(1, limit_bytes // piece_bytes[region])
            for first in range(extent.first, extent.end, step):
                yield Extent(first, min(first + step, extent.end), region, region + 1)
            region += 1
            continue
        last = region + 1
        while last < extent.region_end and size + blocks * piece_bytes[last] <= limit_bytes:
            size += blocks * piece_bytes[last]
            last += 1
        yield Extent(extent.first, extent.end, region, last)
        region = last
