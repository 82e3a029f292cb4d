"""Names for the beginnings of prompts, and which of them a cluster says that it has."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.prefix_names import MAX_NAMES, UNIT_BYTES, from_header, names_of, places
from frontend.resident_prefixes import RECOUNT_EVERY_S, ResidentPrefixes

PROMPT = random.Random(1).randbytes(40_000)


@given(st.integers(0, 40_000), st.integers(0, 39_999))
def test_prompts_share_the_names_of_what_they_share_and_no_others(length: int, different_at: int) -> None:
    other = bytearray(PROMPT)
    other[different_at] ^= 1
    shared = min(length, different_at)
    one, two = names_of("sim", PROMPT), names_of("sim", bytes(other))
    same = [a == b for a, b in zip(one.names, two.names, strict=True)]
    assert same == [place <= different_at for place in places(40_000)]
    assert list(names_of("sim", PROMPT[:shared]).names) == list(one.names[: sum(1 for _ in places(shared))])


@given(st.integers(UNIT_BYTES, 8 << 20))
def test_the_last_place_leaves_out_an_eighth_at_most(length: int) -> None:
    ends = list(places(length))
    assert len(ends) <= MAX_NAMES
    assert ends == sorted(set(ends))
    assert length - ends[-1] <= max(UNIT_BYTES, length / 8)


def test_models_have_names_of_their_own() -> None:
    assert not set(names_of("a", PROMPT).names) & set(names_of("b", PROMPT).names)


def test_a_header_says_what_it_was_made_of() -> None:
    names = names_of("sim", PROMPT)
    read = from_header(names.to_header())
    assert (read.prompt_bytes, list(read.names)) == (names.prompt_bytes, list(names.names))


@pytest.mark.parametrize(
    "value", ["", ";", "x;AAAA", "-1;", "999999999999999;", "4;AAAAAA==", "256;AAA", "1;????", "²;"]
)
def test_what_nobody_could_have_written_is_nothing(value: str) -> None:
    assert not from_header(value).names


def test_a_cluster_names_what_its_workers_still_have() -> None:
    blocks: dict[int, int] = {}
    residents = ResidentPrefixes(lambda keys: blocks.get(keys[0], 0))
    names = names_of("sim", PROMPT[:10_000])
    first = residents.version
    # 2,500 tokens in blocks of 16: 156 whole ones.
    residents.note(names, 2_500, list(range(1, 157)), 16)
    assert list(residents.names(0.0)) == []
    blocks[1] = 156
    assert list(residents.names(RECOUNT_EVERY_S)) == list(names.names)
    assert residents.version != first
    assert residents.bytes_per_token == pytest.approx(4.0)
    # Half of it is evicted: the names of that half are gone.
    blocks[1] = 77
    told = list(residents.names(2 * RECOUNT_EVERY_S))
    assert told == [name for name, end in zip(names.names, places(10_000), strict=True) if end <= 78 * 16 * 4]
