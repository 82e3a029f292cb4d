"""Which of the beginnings that global frontends have names for are in this cluster's KV caches now.

Remembers the last prompts that came with names, asks the block index what of them is still there, and gives the names
of that: those used last first, as many as fit.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from frontend.prefix_names import PrefixNames, places

MAX_PROMPTS = 512
MAX_NAMES_TOLD = 8192
"""32 KiB on the wire, and again only when something has changed."""

RECOUNT_EVERY_S = 2.0
_RATIO_DECAY = 0.95

ResidentBlocks = Callable[[Sequence[int]], int]
"""Of a chain of block keys, how many from the beginning the best worker has."""


@dataclass(slots=True)
class _Prompt:
    names: PrefixNames
    tokens: int
    keys: Sequence[int]
    block_tokens: int


class ResidentPrefixes:
    """Plain data; the time is passed in."""

    def __init__(self, blocks: ResidentBlocks) -> None:
        self._blocks = blocks
        self._prompts: OrderedDict[int, _Prompt] = OrderedDict()
        self._told: list[int] = []
        self._counted_s = -RECOUNT_EVERY_S
        self._bytes, self._tokens = 0.0, 0.0
        # Of another frontend, or of this one before it was restarted, nobody shall take it for the same.
        self.version = secrets.randbits(48)

    @property
    def bytes_per_token(self) -> float:
        """Of the prompts lately; 0 before the first."""
        return self._bytes / self._tokens if self._tokens else 0.0

    def note(self, names: PrefixNames, tokens: int, keys: Sequence[int], block_tokens: int) -> None:
        """A prompt with these names and blocks goes to the workers."""
        if tokens <= 0 or names.prompt_bytes <= 0:
            return
        self._bytes = _RATIO_DECAY * self._bytes + names.prompt_bytes
        self._tokens = _RATIO_DECAY * self._tokens + tokens
        if not names.names or not keys:
            return
        last = names.names[-1]
        self._prompts[last] = _Prompt(names, tokens, array("Q", keys), block_tokens)
        self._prompts.move_to_end(last)
        while len(self._prompts) > MAX_PROMPTS:
            self._prompts.popitem(last=False)

    def names(self, now_s: float) -> Sequence[int]:
        """Of all that is resident; `version` changes with it."""
        if now_s - self._counted_s >= RECOUNT_EVERY_S:
            self._counted_s = now_s
            told = self._count()
            if told != self._told:
                self._told = told
                self.version += 1
        return self._told

    def _count(self) -> list[int]:
        told: dict[int, None] = {}
        for prompt in reversed(self._prompts.values()):
            resident_tokens = self._blocks(prompt.keys) * prompt.block_tokens
            # A prompt's last, incomplete block counts with its block before: names end anywhere.
            resident_tokens += prompt.block_tokens if resident_tokens else 0
            resident_bytes = resident_tokens / prompt.tokens * prompt.names.prompt_bytes
            ends = places(prompt.names.prompt_bytes)
            for name, end in zip(prompt.names.names, ends, strict=False):
                if end > resident_bytes:
                    break
                told[name] = None
            if len(told) >= MAX_NAMES_TOLD:
                break
        return list(told)[:MAX_NAMES_TOLD]
