"""Prompts of exact lengths, as token ids: English-looking words drawn at random, so that no two share a prefix."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from slipstream.errors import StartupError

# A word of its own in a byte-level vocabulary: `Ġ` stands for the space before it.
_WORD = re.compile(r"Ġ[a-z]{2,}")
_ENOUGH_WORDS = 100


def word_ids(model_folder: Path) -> list[int]:
    """The ids of the vocabulary's plain lower-case words.

    Raises:
        StartupError: the tokenizer has hardly any; prompts made of it would not be like text.
    """
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text())["model"]["vocab"]
    ids = sorted(token_id for token, token_id in vocabulary.items() if _WORD.fullmatch(token))
    if len(ids) < _ENOUGH_WORDS:
        raise StartupError(f"{model_folder}: only {len(ids)} English words in the tokenizer's vocabulary")
    return ids


class Prompts:
    """Draws prompts; the same seed draws the same ones in the same order."""

    def __init__(self, words: Sequence[int], seed: int) -> None:
        self._words = words
        self._random = random.Random(seed)

    def draw(self, tokens: int) -> list[int]:
        """A prompt of exactly `tokens` tokens."""
        return self._random.choices(self._words, k=tokens)


def mixed_lengths(lengths: Sequence[int], requests: int, seed: int) -> list[int]:
    """`requests` lengths, each of `lengths` as often as the others (the first ones once more), in a drawn order."""
    mixed = [lengths[index % len(lengths)] for index in range(requests)]
    random.Random(seed).shuffle(mixed)
    return mixed
