"""Who has which KV heads: whatever two workers divide them into, each head arrives once, from one who has it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.shards import partners, share

POWERS = [1, 2, 4, 8, 16]


def heads_of(rank: int, ranks: int, heads: int) -> list[int]:
    """As vLLM divides them."""
    if ranks >= heads:
        return [rank * heads // ranks]
    each = heads // ranks
    return list(range(rank * each, (rank + 1) * each))


@given(sending=st.sampled_from(POWERS), receiving=st.sampled_from(POWERS), heads=st.sampled_from(POWERS))
def test_each_head_of_each_rank_arrives_once_from_a_rank_that_has_it(sending: int, receiving: int, heads: int) -> None:
    for rank in range(receiving):
        own = heads_of(rank, receiving, heads)
        arrived: list[int] = []
        shards = set()
        for sender in partners(rank, receiving, sending):
            here = share(rank, receiving, sender, sending, heads)
            there = share(sender, sending, rank, receiving, heads)
            assert here.shard == there.shard
            shards.add(here.shard)
            theirs = heads_of(sender, sending, heads)
            sent = len(theirs) // there.parts
            taken = len(own) // here.parts
            assert theirs[there.part * sent :][:sent] == own[here.part * taken :][:taken]
            if here.first:
                arrived += own[here.part * taken :][:taken]
        assert arrived == own
        assert len(shards) == len(partners(rank, receiving, sending))


@given(sending=st.sampled_from(POWERS), receiving=st.sampled_from(POWERS))
def test_each_rank_of_a_sender_hears_from_somebody_that_its_part_was_taken(sending: int, receiving: int) -> None:
    asked = [sender for rank in range(receiving) for sender in partners(rank, receiving, sending)]
    assert set(asked) == set(range(sending))
    for sender in range(sending):
        assert asked.count(sender) == len(partners(sender, sending, receiving))


def test_sizes_that_do_not_divide_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="4 and 6"):
        partners(0, 4, 6)
