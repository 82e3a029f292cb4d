"""Encoding word by word gives what the library gives for the whole text, for every tokenizer it is used with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

from frontend import word_tokens
from frontend.tokenizer import TextModel
from frontend.word_tokens import PATTERNS, WordTokens, is_wordwise
from tests.support.text_model_folder import byte_level_tokenizer

ALPHABET = [
    *("a", "B", "he", "ll", "o", "wor", "'s", "'LL", "3", "42", ",", ".", "<", "_", " ", "  ", "\n", "\t", "\r\n"),
    *("é", "e\u0301", "\u0301", "漢", "ǅ", "\u00a0", "\u2003", "\u180e", "\u200b", "\x1c", "\x85", "🙂", "½", "\u0345"),
    *(
        ">\n",
        "\nuser",
        "\n\n",
        ".\n<",
        "<|im_end|>\n<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<s>",
        " a",
        " w",
        " The",
        " word",
    ),
]
texts = st.lists(st.sampled_from(ALPHABET), max_size=12).map("".join)


def tokenizer(steps: list[Any], normalizer: Any = None) -> Tokenizer:
    made = byte_level_tokenizer()
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def split(pattern: str) -> list[Any]:
    return [Split(Regex(pattern), "isolated", False), ByteLevel(add_prefix_space=False, use_regex=False)]


WORDWISE = {
    "gpt-2": tokenizer([ByteLevel(add_prefix_space=False)]),
    "smollm": tokenizer([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "nfc": tokenizer([ByteLevel(add_prefix_space=False)], normalizers.NFC()),
    "nfd": tokenizer([ByteLevel(add_prefix_space=False)], normalizers.NFD()),
    **{f"split-{place}": tokenizer(split(pattern)) for place, pattern in enumerate(sorted(PATTERNS))},
}


def whole(made: Tokenizer, text: str) -> list[int]:
    return list(made.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", WORDWISE)
def test_words_encoded_for_themselves_are_the_text_encoded_at_once(name: str) -> None:
    made = WORDWISE[name]
    assert is_wordwise(json.loads(made.to_str()))
    model = TextModel(made)

    @given(texts)
    def same(text: str) -> None:
        # Twice: once with words that are new, and once with all of them known.
        for _ in range(2):
            assert model.encode_now(text, add_special_tokens=False) == whole(made, text)

    same()


def token(content: str, **flags: bool) -> Tokenizer:
    made = byte_level_tokenizer()
    made.add_tokens([AddedToken(content, normalized=False, **flags)])
    return made


@pytest.mark.parametrize(
    "made",
    [
        tokenizer([ByteLevel(add_prefix_space=True)]),
        tokenizer([ByteLevel(add_prefix_space=False, use_regex=False)]),
        tokenizer(split(r"\s*\w+ \w+|.")),
        tokenizer([ByteLevel(add_prefix_space=False)], normalizers.Lowercase()),
        tokenizer([ByteLevel(add_prefix_space=False)], normalizers.Replace(" ", "▁")),
        token("two words"),
        token("eats", rstrip=True),
        token("eats", lstrip=True),
    ],
    ids=["prefix-space", "uncut", "other-pattern", "lowercase", "replace", "spaced", "rstrip", "lstrip"],
)
def test_other_tokenizers_are_left_to_the_library(made: Tokenizer) -> None:
    assert not is_wordwise(json.loads(made.to_str()))
    text = "two words eats wor hello  a"
    assert TextModel(made).encode_now(text, add_special_tokens=False) == whole(made, text)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_tokens, "REMEMBERED", 10)
    asked: list[str] = []

    def encode(word: str) -> list[int]:
        asked.append(word)
        return [len(word)]

    words = WordTokens(encode)
    for number in range(4):
        text = " ".join(f"{letter}{number}" for letter in "abcd")
        assert words.encode(text) == [2, 3, 3, 3]
        assert len(words) <= 10
    words.encode("x " + "y" * 100)
    words.encode("x " + "y" * 100)
    assert (asked.count("x"), asked.count(" " + "y" * 100)) == (1, 2)
