"""What a simulated model says."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.simulated.tokens import Answer, printable_tokens, vocabulary_size
from slipstream.errors import StartupError
from tests.support.text_model_folder import write_model_folder

WORDS = [10, 11, 12, 13, 14]


def say(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    answer = Answer(array("I", prompt), seed, WORDS)
    return [answer.next() for _ in range(count)]


@given(st.lists(st.integers(0, 1 << 32 - 1), min_size=1, max_size=30), st.integers(0, 20))
def test_an_answer_goes_on_the_same_wherever_it_is_taken_up(prompt: list[int], cut: int) -> None:
    whole = say(prompt, 20)
    assert whole == whole[:cut] + say(prompt + whole[:cut], 20 - cut)


def test_another_seed_or_prompt_is_another_answer() -> None:
    assert len({tuple(say(prompt, 20, seed)) for prompt in ([1], [2]) for seed in (0, 1)}) == 4


def test_words_are_text_that_never_ends_an_answer(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in printable_tokens(folder)]
    assert "hello" in texts
    assert all(text.strip().isalpha() for text in texts)


def test_a_tokenizer_without_letters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"1": 0}}}')
    with pytest.raises(StartupError, match="nothing to say"):
        printable_tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StartupError, match="cannot be read"):
        printable_tokens(tmp_path)


def test_the_vocabulary_is_the_configurations(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    assert vocabulary_size(tmp_path) == 77
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 78}}')
    assert vocabulary_size(tmp_path) == 78
