"""Which worker has the KV blocks of which token prefixes, as far as this frontend sent them there.

For workers that do not tell what they have; of the others `frontend.known_caches` knows better. Soft state, bounded
and never asked of anybody: a worker that has evicted its blocks meanwhile is found out when it is used, and costs a
computation that would have been needed anyway.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from slipstream import block_keys
from slipstream.block_keys import root_key

MAX_PREFIXES = 65536
"""Prefixes remembered, one a block: some 12 MB, and a million tokens even with small blocks of 16."""

MAX_HOLDERS = 4
"""Workers remembered for one prefix. Everybody's system prompt is everywhere: a few are enough to choose from."""

Holder = tuple[str, int]
"""A worker's id and epoch: one that was restarted has nothing any more."""


@dataclass(slots=True)
class PrefixChain:
    """Keys of the whole blocks of one growing token sequence, as workers name them (slipstream.block_keys).

    Attributes:
        block_tokens: tokens a block; 0 makes a chain that stays empty.
        salt: of the cache that they are in.
        keys: of the first block, the second, and so on; each covers everything before it.
        tokens: how many have been appended.
    """

    model: str
    block_tokens: int
    keys: list[int] = field(default_factory=list)
    tokens: int = 0
    salt: str = ""
    _rest: array[int] = field(default_factory=lambda: array("I"))

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens; only new whole blocks are hashed."""
        self.tokens += len(token_ids)
        if self.block_tokens == 0:
            return
        self._rest.extend(token_ids)
        whole = len(self._rest) - len(self._rest) % self.block_tokens
        if whole == 0:
            return
        last = self.keys[-1] if self.keys else root_key(self.model, self.block_tokens, self.salt)
        self.keys += block_keys.extend(last, self._rest[:whole], self.block_tokens)
        del self._rest[:whole]

    def covering(self, tokens: int) -> Sequence[int]:
        """The keys of blocks that lie within the first so many tokens."""
        return self.keys[: max(0, tokens) // self.block_tokens] if self.block_tokens else []


class ConversationCache:
    """Block key -> workers, least recently used ones dropped first. Plain data: no clock, no I/O."""

    def __init__(self, *, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        self._holders: OrderedDict[int, tuple[Holder, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def remember(self, keys: Sequence[int], holder: Holder) -> None:
        """This worker has the blocks of all these prefixes now. More than fit are remembered from the beginning."""
        # The longest first: what is used last is dropped last, and a prefix without its own prefixes is worth nothing.
        for key in reversed(keys[: self._max_prefixes]):
            others = tuple(other for other in self._holders.get(key, ()) if other[0] != holder[0])
            self._holders[key] = (holder, *others[: MAX_HOLDERS - 1])
            self._holders.move_to_end(key)
        while len(self._holders) > self._max_prefixes:
            self._holders.popitem(last=False)

    def forget(self, keys: Iterable[int], holder: Holder) -> None:
        """This worker turned out not to have these any more."""
        for key in keys:
            left = tuple(other for other in self._holders.get(key, ()) if other != holder)
            if left:
                self._holders[key] = left
            else:
                self._holders.pop(key, None)

    def blocks_known(self, keys: Sequence[int]) -> dict[Holder, int]:
        """For each worker the number of whole blocks, from the beginning, that it has of this sequence."""
        known: dict[Holder, int] = {}
        found = 0
        for count, key in enumerate(keys, start=1):
            holders = self._holders.get(key)
            if holders is None:
                break
            found = count
            for holder in holders:
                known[holder] = count
        for key in reversed(keys[:found]):
            self._holders.move_to_end(key)
        return known
