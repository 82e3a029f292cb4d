"""What is said about two engines' answers, and from which link speed on compressing does not pay."""

from __future__ import annotations

import math

import pytest

from benchmarks.answer_difference import Answer, break_even_bytes_per_s, difference

EVEN = {1: math.log(0.5), 2: math.log(0.5)}
TILTED = {1: math.log(0.75), 2: math.log(0.25)}


def test_equal_answers_differ_in_nothing() -> None:
    found = difference([Answer([1, 2], EVEN)] * 3, [Answer([1, 2], EVEN)] * 3)

    assert (found.prompts, found.tokens) == (3, 2)
    assert (found.identical_share, found.agreement_share, found.first_token_share) == (1, 1, 1)
    assert (found.logprob_delta, found.kl_mean, found.kl_max) == (0, 0, 0)


def test_tokens_count_until_the_first_that_differs() -> None:
    originals = [Answer([1, 2, 1, 2], EVEN)] * 3
    changed = [Answer(ids, EVEN) for ids in ([1, 2, 1, 2], [1, 1, 1, 2], [2, 2, 1, 2])]

    found = difference(originals, changed)

    assert found.identical_share == pytest.approx(1 / 3)
    assert found.agreement_share == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert found.first_token_share == pytest.approx(2 / 3)


def test_probabilities_are_compared_where_the_original_had_them() -> None:
    found = difference([Answer([1], EVEN), Answer([2], EVEN)], [Answer([1], TILTED), Answer([2], EVEN)])

    assert found.logprob_delta == pytest.approx(math.log(1.5) / 2)
    assert found.kl_max == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert found.kl_mean == pytest.approx(found.kl_max / 2)


def test_at_the_break_even_speed_both_ways_take_equally_long() -> None:
    kv_bytes, wire_share, encode, decode = 1e9, 0.5, 1e9, 2e9

    link = break_even_bytes_per_s(wire_share, encode, decode)

    assert kv_bytes / link == pytest.approx(kv_bytes / encode + kv_bytes * wire_share / link + kv_bytes / decode)
