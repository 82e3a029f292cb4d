"""Keys of KV blocks: equal for equal beginnings, different for anything else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream.block_keys import extend, root_key

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=100)


@given(tokens, tokens, st.integers(1, 20))
def test_extending_in_two_goes_gives_the_keys_of_one(first: list[int], second: list[int], block_tokens: int) -> None:
    root = root_key("m", block_tokens)
    whole = extend(root, first + second, block_tokens)
    cut = len(first) - len(first) % block_tokens
    begun = extend(root, first[:cut], block_tokens)
    assert begun + extend(begun[-1] if begun else root, (first + second)[cut:], block_tokens) == whole
    assert len(whole) == len(first + second) // block_tokens


@given(tokens.filter(lambda ids: len(ids) >= 4), st.data())
def test_a_changed_token_changes_the_keys_from_its_block_on(ids: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(ids) - 1 - len(ids) % 4))
    changed = [*ids[:place], ids[place] ^ 1, *ids[place + 1 :]]
    one, other = extend(root_key("m", 4), ids, 4), extend(root_key("m", 4), changed, 4)
    block = place // 4
    assert one[:block] == other[:block]
    assert all(a != b for a, b in zip(one[block:], other[block:], strict=True))


def test_models_block_sizes_and_salts_do_not_share_keys() -> None:
    roots = {root_key("m", 16), root_key("n", 16), root_key("m", 32), root_key("m", 16, "tenant")}
    assert len(roots) == 4
