"""What a simulated model says: words that follow from all tokens before them and a seed, whoever computes them.

An answer that goes on at another worker, or is computed again after a preemption, is the same answer.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from slipstream.errors import StartupError

_WORD = re.compile(r"[Ġ▁ ]?[A-Za-z]{2,12}")
_LETTER = re.compile(r"[A-Za-z]")
_MOST_WORDS = 4096


class Answer:
    """The tokens after a prompt, one after another.

    Args:
        words: token ids to choose from; see `printable_tokens`.
    """

    __slots__ = ("_hash", "_words")

    def __init__(self, prompt: array[int], seed: int, words: Sequence[int]) -> None:
        self._hash = xxhash.xxh3_64(prompt.tobytes(), seed)
        self._words = words

    def next(self) -> int:
        """The next token; it is part of what the one after it follows from."""
        token = self._words[self._hash.intdigest() % len(self._words)]
        self._hash.update(token.to_bytes(4, "little"))
        return token


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _Added(msgspec.Struct):
    id: int


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []


def printable_tokens(folder: Path) -> list[int]:
    """Tokens that are words, or parts of some, and never end a text: of those the lowest ids.

    Args:
        folder: a model's; its tokenizer.json is read.

    Raises:
        StartupError: it cannot be read, or has no letters.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = msgspec.json.decode(path.read_bytes(), type=_Tokenizer)
    except (OSError, msgspec.DecodeError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error
    vocab = tokenizer.model.vocab
    pairs = vocab.items() if isinstance(vocab, dict) else ((text, at) for at, (text, _) in enumerate(vocab))
    special = {token.id for token in tokenizer.added_tokens}
    plain = [(token_id, text) for text, token_id in pairs if token_id not in special]
    for pattern in (_WORD, _LETTER):
        if found := sorted(token_id for token_id, text in plain if pattern.fullmatch(text)):
            return found[:_MOST_WORDS]
    raise StartupError(f"{path} has no token that is a letter: the simulated engine has nothing to say")


def vocabulary_size(folder: Path) -> int:
    """Of the model; 2**32 when its config.json does not say."""
    try:
        config: dict[str, Any] = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return 1 << 32
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size) if isinstance(size, int) else 1 << 32
