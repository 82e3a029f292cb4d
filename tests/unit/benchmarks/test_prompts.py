"""Prompts have their exact length, are drawn again by the same seed, and share no prefix."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prompts import Prompts, mixed_lengths, word_ids
from slipstream.errors import StartupError

WORDS = range(1000, 6000)


def test_words_are_the_plain_lower_case_words_of_the_vocabulary(tmp_path: Path) -> None:
    words = {f"Ġ{chr(97 + index % 26)}{chr(97 + index // 26)}": index for index in range(200)}
    other = {"Ġa": 900, "the": 901, "Ġ12": 902, "ĠThe": 903, "Ġcafé": 904}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words | other}}))

    assert word_ids(tmp_path) == list(range(200))


def test_a_vocabulary_without_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"Ġthe": 1}}}))

    with pytest.raises(StartupError, match="only 1 English words"):
        word_ids(tmp_path)


@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=5))
def test_the_same_seed_draws_the_same_prompts_of_the_asked_lengths(seed: int, lengths: list[int]) -> None:
    first, second = Prompts(WORDS, seed), Prompts(WORDS, seed)
    drawn = [first.draw(tokens) for tokens in lengths]

    assert [len(prompt) for prompt in drawn] == lengths
    assert [second.draw(tokens) for tokens in lengths] == drawn


def test_prompts_do_not_begin_alike() -> None:
    prompts = Prompts(WORDS, seed=1)
    beginnings = {tuple(prompts.draw(100)[:4]) for _ in range(200)}

    assert len(beginnings) == 200


@given(requests=st.integers(1, 60), seed=st.integers(0, 100))
def test_lengths_are_mixed_evenly(requests: int, seed: int) -> None:
    counts = Counter(mixed_lengths((100, 500, 2000), requests, seed))

    assert counts.total() == requests
    assert max(counts.values()) - min(counts[length] for length in (100, 500, 2000)) <= 1
