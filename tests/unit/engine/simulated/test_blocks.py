"""Which blocks are held, cached and evicted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.simulated.blocks import BlockPool


def cache(pool: BlockPool, *keys: int) -> list[int]:
    """A sequence of blocks with these keys, held."""
    blocks = pool.take(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.store(block, key)
    return blocks


def test_a_freed_block_stays_cached_until_its_place_is_needed() -> None:
    pool = BlockPool(3)
    pool.give_back(cache(pool, 10, 11))
    assert pool.free == 3
    assert len(pool.match([10, 11, 12], 3)) == 2
    pool.take(2)  # one was never used; the other was the tail of the sequence
    assert len(pool.match([10, 11], 2)) == 1


def test_the_least_recently_freed_goes_first_and_of_a_sequence_its_tail() -> None:
    pool = BlockPool(4)
    first, second = cache(pool, 10, 11), cache(pool, 20, 21)
    pool.give_back(second)
    pool.give_back(first)
    assert pool.eviction_order() == [21, 20, 11, 10]


def test_a_hit_makes_a_block_recent_again() -> None:
    pool = BlockPool(3)
    for key in (10, 20, 30):
        pool.give_back(cache(pool, key))
    hit = pool.match([10], 1)
    pool.hold(hit)
    pool.give_back(hit)
    assert pool.eviction_order() == [20, 30, 10]


def test_blocks_without_content_are_taken_before_cached_ones() -> None:
    pool = BlockPool(2)
    plain, cached = pool.take(1), cache(pool, 10)
    pool.give_back(cached)
    pool.give_back(plain)
    assert pool.take(1) == plain
    assert pool.match([10], 1) == cached


def test_a_shared_block_is_free_when_its_last_holder_gives_it_back() -> None:
    pool = BlockPool(1)
    blocks = cache(pool, 10)
    pool.hold(blocks)
    pool.give_back(blocks)
    assert pool.free == 0
    pool.give_back(blocks)
    assert pool.free == 1
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.give_back(blocks)


def test_more_than_is_free_cannot_be_taken() -> None:
    pool = BlockPool(2)
    with pytest.raises(IndexError, match="2 of 2 are free"):
        pool.take(3)
    assert pool.free == 2


def test_changes_that_cancel_out_are_not_told() -> None:
    pool = BlockPool(1)
    pool.give_back(cache(pool, 10))
    pool.give_back(cache(pool, 20))
    assert pool.drain() == ([20], [])
    pool.give_back(cache(pool, 10))
    pool.give_back(cache(pool, 20))
    assert pool.drain() == ([], [])


def test_to_forget_everything_is_told_block_by_block() -> None:
    pool = BlockPool(4)
    pool.give_back(cache(pool, 10, 11))
    pool.drain()
    pool.clear()
    assert (pool.free, pool.cached) == (4, 0)
    assert sorted(pool.drain()[1]) == [10, 11]


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))))
def test_held_and_free_are_all_there_is_and_the_cache_is_what_was_told(steps: list[tuple[int, list[int]]]) -> None:
    pool = BlockPool(8)
    held: list[list[int]] = []
    told: set[int] = set()
    for action, keys in steps:
        if action == 0 and len(keys) <= pool.free:
            held.append(cache(pool, *keys))
        elif action == 1 and held:
            pool.give_back(held.pop(keys[0] % len(held)))
        elif action == 2 and (hits := pool.match(keys, len(keys))):
            pool.hold(hits)
            held.append(hits)
        assert pool.used == len({block for blocks in held for block in blocks})
        stored, removed = pool.drain()
        assert told.isdisjoint(stored)
        assert told.issuperset(removed)
        told = (told | set(stored)) - set(removed)
        assert all(bool(pool.match([key], 1)) == (key in told) for key in range(10))
