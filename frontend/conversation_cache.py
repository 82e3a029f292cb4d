"""Which worker has the KV blocks of which token prefixes, as far as this frontend sent them there.

Soft state, bounded and never asked of anybody: a worker that has evicted its blocks meanwhile is found out when
it is used, and costs a computation that would have been needed anyway.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

DIGEST_BYTES = 16
MAX_PREFIXES = 65536
"""Prefixes remembered, one a block: some 20 MB, and a million tokens even with small blocks of 16."""

MAX_HOLDERS = 4
"""Workers remembered for one prefix. Everybody's system prompt is everywhere: a few are enough to choose from."""

Holder = tuple[str, int]
"""A worker's id and epoch: one that was restarted has nothing any more."""


@dataclass(slots=True)
class PrefixChain:
    """Digests of the block-aligned prefixes of one growing token sequence.

    Each digest covers all tokens before it (it is chained), the model and the block size.

    Attributes:
        block_tokens: tokens a block; 0 makes a chain that stays empty.
        digests: of the first block, the first two blocks, and so on.
        tokens: how many have been appended.
    """

    model: str
    block_tokens: int
    digests: list[bytes] = field(default_factory=list)
    tokens: int = 0
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
        data, size = self._rest[:whole].tobytes(), self.block_tokens * self._rest.itemsize
        last = self.digests[-1] if self.digests else f"{self.model}/{self.block_tokens}".encode()
        for start in range(0, len(data), size):
            last = blake2b(last + data[start : start + size], digest_size=DIGEST_BYTES).digest()
            self.digests.append(last)
        del self._rest[:whole]

    def covering(self, tokens: int) -> Sequence[bytes]:
        """The digests of prefixes that lie within the first so many tokens."""
        return self.digests[: max(0, tokens) // self.block_tokens] if self.block_tokens else []


class ConversationCache:
    """Prefix digest -> workers, least recently used ones dropped first. Plain data: no clock, no I/O."""

    def __init__(self, *, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        self._holders: OrderedDict[bytes, tuple[Holder, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def remember(self, digests: Sequence[bytes], holder: Holder) -> None:
        """This worker has the blocks of all these prefixes now. More than fit are remembered from the beginning."""
        # The longest first: what is used last is dropped last, and a prefix without its own prefixes is worth nothing.
        for digest in reversed(digests[: self._max_prefixes]):
            others = tuple(other for other in self._holders.get(digest, ()) if other[0] != holder[0])
            self._holders[digest] = (holder, *others[: MAX_HOLDERS - 1])
            self._holders.move_to_end(digest)
        while len(self._holders) > self._max_prefixes:
            self._holders.popitem(last=False)

    def forget(self, digests: Iterable[bytes], holder: Holder) -> None:
        """This worker turned out not to have these any more."""
        for digest in digests:
            left = tuple(other for other in self._holders.get(digest, ()) if other != holder)
            if left:
                self._holders[digest] = left
            else:
                self._holders.pop(digest, None)

    def blocks_known(self, digests: Sequence[bytes]) -> dict[Holder, int]:
        """For each worker the number of whole blocks, from the beginning, that it has of this sequence."""
        known: dict[Holder, int] = {}
        found = 0
        for count, digest in enumerate(digests, start=1):
            holders = self._holders.get(digest)
            if holders is None:
                break
            found = count
            for holder in holders:
                known[holder] = count
        for digest in reversed(digests[:found]):
            self._holders.move_to_end(digest)
        return known
