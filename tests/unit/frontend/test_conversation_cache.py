"""The prefix memory: what it may say of a worker, and what bounds it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from frontend.conversation_cache import MAX_HOLDERS, ConversationCache, PrefixChain

BLOCK = 4
TOKENS = st.lists(st.integers(0, 3), max_size=40)


def chain(*parts: list[int], block_tokens: int = BLOCK, model: str = "m") -> PrefixChain:
    made = PrefixChain(model, block_tokens)
    for part in parts:
        made.extend(part)
    return made


def shared_blocks(one: list[int], other: list[int]) -> int:
    """Whole blocks at the beginning that two sequences have in common."""
    equal = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        equal += 1
    return equal // BLOCK


@given(TOKENS, st.lists(st.integers(0, 40), max_size=5))
def test_a_chain_does_not_depend_on_how_the_tokens_came(tokens: list[int], cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    parts = [tokens[start:end] for start, end in pairwise(places)]
    assert chain(*parts).keys == chain(tokens).keys
    assert chain(*parts).tokens == len(tokens)


@given(TOKENS, TOKENS)
def test_two_chains_agree_exactly_as_far_as_their_whole_blocks_do(one: list[int], other: list[int]) -> None:
    pairs = zip(chain(one).keys, chain(other).keys, strict=False)
    assert sum(left == right for left, right in pairs) == shared_blocks(one, other)


def test_other_models_and_other_block_sizes_share_nothing() -> None:
    tokens = list(range(16))
    keys = {*chain(tokens).keys, *chain(tokens, model="n").keys, *chain(tokens, block_tokens=2).keys}
    assert len(keys) == 4 + 4 + 8
    assert chain(tokens, block_tokens=0).keys == []


@given(st.lists(st.tuples(TOKENS, st.sampled_from(["a", "b", "c"])), max_size=8), TOKENS)
def test_a_worker_is_said_to_have_the_longest_prefix_that_it_was_given(
    given_before: list[tuple[list[int], str]], prompt: list[int]
) -> None:
    cache, longest = ConversationCache(), dict[tuple[str, int], int]()
    for tokens, name in given_before:
        cache.remember(chain(tokens).keys, (name, 1))
        longest[name, 1] = max(longest.get((name, 1), 0), shared_blocks(tokens, prompt))
    expected = {holder: blocks for holder, blocks in longest.items() if blocks}
    assert cache.blocks_known(chain(prompt).keys) == expected


@given(st.lists(TOKENS, max_size=20), st.integers(1, 12))
def test_it_never_holds_more_than_its_limit_and_keeps_the_newest(prompts: list[list[int]], limit: int) -> None:
    cache = ConversationCache(max_prefixes=limit)
    for tokens in prompts:
        keys = chain(tokens).keys
        cache.remember(keys, ("w", 1))
        assert len(cache) <= limit
        assert cache.blocks_known(keys) == ({("w", 1): min(limit, len(keys))} if keys else {})


def test_what_is_looked_up_is_kept_longer_than_what_is_not() -> None:
    cache = ConversationCache(max_prefixes=2)
    used, unused, new = (chain([number] * BLOCK).keys for number in range(3))
    cache.remember(used, ("w", 1))
    cache.remember(unused, ("w", 1))
    assert cache.blocks_known(used)
    cache.remember(new, ("w", 1))
    assert cache.blocks_known(used)
    assert not cache.blocks_known(unused)


def test_a_restarted_worker_has_only_what_it_was_given_since() -> None:
    cache, tokens = ConversationCache(), list(range(3 * BLOCK))
    cache.remember(chain(tokens).keys, ("w", 1))
    cache.remember(chain(tokens[:BLOCK]).keys, ("w", 2))
    assert cache.blocks_known(chain(tokens).keys) == {("w", 1): 3, ("w", 2): 1}


def test_what_a_worker_turned_out_not_to_have_is_forgotten() -> None:
    cache, keys = ConversationCache(), chain(list(range(3 * BLOCK))).keys
    cache.remember(keys, ("w", 1))
    cache.remember(keys, ("v", 1))
    cache.forget(keys[1:], ("w", 1))
    assert cache.blocks_known(keys) == {("w", 1): 1, ("v", 1): 3}
    cache.forget(keys, ("v", 1))
    assert cache.blocks_known(keys) == {("w", 1): 1}
    assert len(cache) == 1


def test_of_a_prefix_that_everybody_has_the_newest_few_workers_are_remembered() -> None:
    cache, keys = ConversationCache(), chain([0] * BLOCK).keys
    for number in range(10):
        cache.remember(keys, (f"w{number}", 1))
    assert set(cache.blocks_known(keys)) == {(f"w{number}", 1) for number in range(10 - MAX_HOLDERS, 10)}
