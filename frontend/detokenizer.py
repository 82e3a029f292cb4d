"""From token ids to text as they arrive, and the end of the text at a stop string.

Laws, tested as such: the pieces joined are the decoded whole, for any split; and with stop strings the text
that was let through is the whole cut before the match, for any split.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

_REPLACEMENT = "�"


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text. One object a sequence."""

    def push(self, token_id: int) -> str:
        """The text that is now certain; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For tokenizers whose tokens are runs of bytes.

    Args:
        bytes_of: the bytes a token adds to the text; none for special tokens.
        strip_first_space: the text loses one leading space.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, strip_first_space: bool) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = strip_first_space

    def push(self, token_id: int) -> str:
        return self._strip(self._utf8.decode(self._bytes_of(token_id)))

    def finish(self) -> str:
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text.removeprefix(" ")


class WindowDetokenizer:
    """For every other tokenizer: decodes a window that starts a token or two before the new one.

    `tokenizers.decoders.DecodeStream` works the same way, but cannot be flushed and raises for good when a
    decoder rewrites what it has already given out.

    Args:
        decode: the tokenizer's own decoding of a few ids, special tokens left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # ids at the window's start whose text is out; kept because decoders look at neighbours
        self._given_text = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(text) <= len(self._given_text) or text.endswith(_REPLACEMENT):
            return ""
        new = text[len(self._given_text) :]
        self._window = self._window[self._given :]
        self._given = len(self._window)
        self._given_text = self._decode(self._window)
        return new

    def finish(self) -> str:
        return self._decode(self._window)[len(self._given_text) :]


@dataclass(frozen=True, slots=True)
class Released:
    """Text that may be shown, and the stop string that ended it, when one did."""

    text: str
    stop: str | None = None


class StopStrings:
    """Looks for stop strings in text that comes in pieces.

    The string that is complete first wins, and of those the one that began first: the one rule that gives the same
    answer for every split of the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> Released:
        """Let `text` through, up to a stop string or to what may be the beginning of one."""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _end, start, stop = min(found)
            self._held = ""
            return Released(text[:start], stop)
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return Released(text[: len(text) - keep])

    def finish(self) -> str:
        """The text held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
