"""The block index against the plainest thing that does the same: a dict of sets."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.block_index import MAX_PROBES, BlockIndex
from frontend.block_table import Keys
from frontend.owner_places import OwnerPlaces
from frontend.owner_sets import members
from slipstream.block_keys import extend, root_key

ROOT = root_key("m", 4)


def chain(seed: int, blocks: int, *, shared: int = 0) -> list[int]:
    """Keys of a prompt; prompts of different seeds begin with the same `shared` blocks."""
    same = [7] * (4 * shared)
    return extend(ROOT, same + random.Random(seed).choices(range(1000), k=4 * (blocks - shared)), 4)


def array(keys: Sequence[int]) -> Keys:
    return np.array(keys, dtype=np.uint64)


def hits(index: BlockIndex, keys: Sequence[int]) -> dict[int, int]:
    return index.match(keys).by_owner()


class Model:
    """Owners by block; a worker that left is struck out of all of them."""

    def __init__(self) -> None:
        self.owners: defaultdict[int, set[int]] = defaultdict(set)

    def blocks(self, keys: Sequence[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for count, key in enumerate(keys, start=1):
            for owner in self.owners[key]:
                if found.get(owner, 0) == count - 1:
                    found[owner] = count
        return found


# Chains that share beginnings, as prompts do; a step is (worker, chain, blocks): the worker comes to have just so many.
CHAINS = [chain(seed, 24, shared=shared) for seed, shared in enumerate((0, 0, 5, 5, 12, 12, 12, 20))]
STEPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, len(CHAINS) - 1), st.integers(-1, 24)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.booleans())
def test_every_worker_is_found_with_the_blocks_that_it_has(steps: list[tuple[int, int, int]], tidy: bool) -> None:
    index, model = BlockIndex(), Model()
    workers = [index.enter() for _ in range(5)]
    had: defaultdict[int, dict[int, int]] = defaultdict(dict)  # by worker: blocks of each chain
    for worker, which, blocks in steps:
        owner = workers[worker]
        if blocks < 0:  # it was restarted
            index.leave(owner)
            for owners in model.owners.values():
                owners.discard(owner)
            workers[worker], had[worker] = index.enter(), {}
        else:
            had[worker][which] = blocks
            has = {key for one, count in had[worker].items() for key in CHAINS[one][:count]}
            gone = [key for key in CHAINS[which] if owner in model.owners[key] and key not in has]
            index.store(owner, array(CHAINS[which][:blocks]))
            index.remove(owner, array(gone))
            for key in has:
                model.owners[key].add(owner)
            for key in gone:
                model.owners[key].discard(owner)
        if tidy:
            while index.tidy():
                pass
            assert len(index) == sum(bool(owners) for owners in model.owners.values())
        for keys in CHAINS:
            assert hits(index, keys) == model.blocks(keys)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.lists(st.integers(0, 60), min_size=1, max_size=30)), max_size=60
    )
)
def test_any_history_leaves_each_block_with_its_owners(steps: list[tuple[bool, int, list[int]]]) -> None:
    """Duplicates, removals of what was never stored, and key 0, which marks empty slots inside."""
    index, model = BlockIndex(), Model()
    owners = [index.enter() for _ in range(4)]
    for stores, which, keys in steps:
        owner = owners[which]
        (index.store if stores else index.remove)(owner, array(keys))
        for key in keys:
            (model.owners[key or 1].add if stores else model.owners[key or 1].discard)(owner)
    for key in range(61):
        assert set(members(index.owners(key))) == model.owners[key or 1]
    assert len(index) == sum(bool(found) for found in model.owners.values())


def test_growth_loses_nothing_while_entries_are_moved() -> None:
    index = BlockIndex()
    owners = [index.enter() for _ in range(50)]
    rng, prompts = random.Random(1), []
    for number in range(600):
        prompts.append((chain(number, 60), rng.sample(owners, 2)))
        for owner in prompts[-1][1]:
            index.store(owner, array(prompts[-1][0]))
        if number % 40 == 0:
            for keys, who in prompts:
                assert hits(index, keys) == dict.fromkeys(who, 60)
    assert len(index) == 600 * 60
    for keys, who in prompts[:500]:
        for owner in who:
            index.remove(owner, array(keys))
    assert len(index) == 100 * 60
    assert [hits(index, keys) for keys, _ in prompts[499:501]] == [{}, dict.fromkeys(prompts[500][1], 60)]


def test_a_cache_that_turns_over_for_ever_keeps_its_size() -> None:
    index = BlockIndex()
    owner, held = index.enter(), list[list[int]]()
    sizes = set()
    for number in range(2000):
        held.append(chain(number, 50))
        index.store(owner, array(held[-1]))
        if len(held) > 40:
            index.remove(owner, array(held.pop(0)))
        if number > 500:
            sizes.add(index.nbytes)
    assert len(index) == 40 * 50
    assert max(sizes) <= 3 * min(sizes), "beyond the move from one table to the next, nothing grows"


def test_a_worker_that_left_is_forgotten_at_once_and_its_number_given_on_later() -> None:
    index = BlockIndex()
    first, other = index.enter(), index.enter()
    keys = chain(1, 40)
    index.store(first, array(keys))
    index.store(other, array(keys[:10]))
    index.leave(first)
    assert hits(index, keys) == {other: 10}
    again = index.enter()
    assert again not in (first, other), "its blocks have not been struck out yet"
    assert hits(index, keys) == {other: 10}
    while index.tidy():
        pass
    assert index.enter() == first
    assert hits(index, keys) == {other: 10}
    assert len(index) == 10


def test_a_prompt_that_a_thousand_workers_have_to_different_depths_is_looked_up_in_bounded_time() -> None:
    index = BlockIndex()
    keys = chain(1, 2000)
    owners = [index.enter() for _ in range(1000)]
    for depth, owner in enumerate(owners, start=1):
        index.store(owner, array(keys[: 2 * depth]))
    found = hits(index, keys)
    assert len(found) == 1000
    assert all(found[owner] <= 2 * depth for depth, owner in enumerate(owners, start=1)), "never more than it has"
    worst = max(2 * depth - found[owner] for depth, owner in enumerate(owners, start=1))
    assert worst <= 4 * 2000 / MAX_PROBES, "and not much less"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 24)), max_size=120), st.randoms(use_true_random=False))
def test_by_place_is_the_same_as_by_owner_with_the_most_of_those_that_share_a_place(
    steps: list[tuple[int, int]], draw: random.Random
) -> None:
    index, places, keys = BlockIndex(), OwnerPlaces(), chain(1, 24)
    owners = [index.enter() for _ in range(40)]
    for owner, blocks in steps:
        index.store(owner, array(keys[:blocks]))
        places.put(draw.choice(owners), draw.randrange(-1, 20))
        place_of = {one: places.of(1 << one)[0] for one in owners}
        found, expected = index.match(keys).spread(20, places), dict.fromkeys(range(20), 0)
        for one, count in hits(index, keys).items():
            if place_of[one] >= 0:
                expected[place_of[one]] = max(expected[place_of[one]], count)
        assert {place: found.at(place) for place in range(20)} == expected


@pytest.mark.parametrize("blocks", [1, 2, 3, 37, 8200])
def test_a_chain_of_any_length_is_found_to_its_end(blocks: int) -> None:
    index = BlockIndex()
    owner, keys = index.enter(), chain(3, blocks)
    index.store(owner, array(keys))
    assert hits(index, [*keys, 99]) == {owner: blocks}
    found = index.match(keys).spread(3, OwnerPlaces(np.array([1])))
    assert [found.at(place) for place in range(4)] == [0, blocks, 0, 0]
    assert hits(index, []) == {}
