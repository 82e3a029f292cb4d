"""Rectangles of pieces: what cutting and joining them keeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.extents import Extent, cut, joined

SIZES = [100, 250, 100, 7, 1000, 250]
BLOCKS, REGIONS = st.integers(0, 12), st.integers(0, len(SIZES))
EXTENTS = st.builds(Extent, BLOCKS, BLOCKS, REGIONS, REGIONS)


def pieces(extent: Extent) -> set[tuple[int, int]]:
    return set(extent.each())


def size(extent: Extent) -> int:
    return sum(SIZES[region] for region, _ in extent.each())


@given(EXTENTS, st.integers(1, 4000))
def test_the_parts_are_the_whole_and_do_not_overlap(extent: Extent, limit_bytes: int) -> None:
    parts = list(cut(extent, SIZES, limit_bytes))
    assert set().union(*map(pieces, parts)) == pieces(extent)
    assert sum(part.pieces for part in parts) == extent.pieces
    assert all(part.pieces for part in parts)


@given(EXTENTS, st.integers(1, 4000))
def test_no_part_is_larger_than_the_limit_unless_it_is_one_piece(extent: Extent, limit_bytes: int) -> None:
    assert all(size(part) <= limit_bytes or part.pieces == 1 for part in cut(extent, SIZES, limit_bytes))


@given(EXTENTS)
def test_what_fits_stays_in_one_part(extent: Extent) -> None:
    assert list(cut(extent, SIZES, 1 << 20)) == ([extent] if extent.pieces else [])


@given(EXTENTS)
def test_the_number_of_pieces_is_that_of_those_listed(extent: Extent) -> None:
    assert extent.pieces == len(pieces(extent)) == len(list(extent.each()))


@given(EXTENTS, BLOCKS, BLOCKS)
def test_clipping_keeps_the_pieces_inside_and_no_others(extent: Extent, first: int, end: int) -> None:
    assert pieces(extent.clip(first, end)) == {(r, b) for r, b in extent.each() if first <= b < end}


@given(EXTENTS, EXTENTS)
def test_two_that_were_joined_are_both_and_nothing_more(a: Extent, b: Extent) -> None:
    whole = joined(a, b)
    if whole is not None and a.pieces and b.pieces:
        assert pieces(whole) == pieces(a) | pieces(b)
        assert whole.pieces == a.pieces + b.pieces


def test_the_next_layer_and_the_next_blocks_join() -> None:
    assert joined(Extent(0, 4, 0, 1), Extent(0, 4, 1, 2)) == Extent(0, 4, 0, 2)
    assert joined(Extent(0, 4, 0, 6), Extent(4, 5, 0, 6)) == Extent(0, 5, 0, 6)
    assert joined(Extent(0, 4, 0, 1), Extent(0, 4, 2, 3)) is None
    assert joined(Extent(0, 4, 0, 1), Extent(4, 5, 1, 2)) is None
