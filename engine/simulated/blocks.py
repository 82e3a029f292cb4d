"""Paged KV blocks: who holds which, what is cached in them, and which goes next when a new one is needed.

The rules are those of vLLM's block pool (vllm/v1/core/block_pool.py, 0.32): a block that nobody holds keeps its
content until it is taken for something else; blocks without a key are taken first, the last freed one before the
others; then cached ones, least recently freed first, and of those freed together the tail of the sequence first.
Unlike there, a second copy of a key that is cached already is not entered: it is worth nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """The blocks of one engine, as numbers from 0; each operation takes time by the blocks it is about.

    Args:
        blocks: in all.
        record: keep what enters and leaves the cache, for `drain`.
    """

    __slots__ = (
        "_cached_free",
        "_holder",
        "_holders",
        "_key",
        "_plain_free",
        "_record",
        "_removed",
        "_stored",
        "total",
    )

    def __init__(self, blocks: int, *, record: bool = True) -> None:
        self.total = blocks
        self._holders = [0] * blocks  # of blocks with a key; those without one have one holder or are free
        self._key: list[int | None] = [None] * blocks
        self._holder: dict[int, int] = {}  # the block that has a key's content
        self._plain_free = list(range(blocks - 1, -1, -1))  # taken from the end
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # taken from the front
        self._record = record
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds, cached ones too."""
        return len(self._plain_free) + len(self._cached_free)

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Keys that a prompt could hit."""
        return len(self._holder)

    def match(self, keys: Sequence[int], most: int) -> list[int]:
        """The cached blocks of the longest known prefix of `keys`, `most` at most. They are not held by that."""
        found = []
        holder = self._holder
        for index in range(min(most, len(keys))):
            block = holder.get(keys[index])
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these are free: to hold them takes them away from others."""
        holders = self._holders
        return sum(1 for block in blocks if not holders[block])

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold cached blocks, once more if they are held."""
        holders = self._holders
        for block in blocks:
            if not holders[block]:
                del self._cached_free[block]
            holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Hold that many free blocks for new content; what was cached in them is gone.

        Raises:
            IndexError: fewer are free.
        """
        if count > self.free:
            raise IndexError(f"{count} blocks asked for, {self.free} of {self.total} are free")
        plain = self._plain_free
        if len(plain) >= count > 0:
            taken = plain[: -count - 1 : -1]
            del plain[-count:]
        else:
            taken = plain[::-1]
            plain.clear()
            for _ in range(count - len(taken)):
                block, _ = self._cached_free.popitem(last=False)
                self._forget(block)
                taken.append(block)
        return taken

    def take_one(self) -> int:
        """`take` of one block, which is known to be free."""
        if self._plain_free:
            return self._plain_free.pop()
        block, _ = self._cached_free.popitem(last=False)
        self._forget(block)
        return block

    def store(self, block: int, key: int) -> None:
        """A held block has the whole content of this key from now on."""
        if key in self._holder or self._key[block] is not None:
            return
        self._holders[block] = 1
        self._holder[key] = block
        self._key[block] = key
        if self._record and self._removed.pop(key, 0) == 0:
            self._stored[key] = None

    def give_back(self, blocks: Sequence[int]) -> None:
        """A holder of these, in the order of its sequence, holds them no more.

        Raises:
            ValueError: one with a key is not held.
        """
        holders, keys = self._holders, self._key
        plain = []
        for block in reversed(blocks):
            if keys[block] is None:
                plain.append(block)
                continue
            held = holders[block]
            if held == 1:
                holders[block] = 0
                self._cached_free[block] = None
            elif held:
                holders[block] = held - 1
            else:
                raise ValueError(f"block {block} is given back, but nobody holds it")
        plain.reverse()
        self._plain_free += plain

    def give_back_plain(self, blocks: Sequence[int]) -> None:
        """`give_back` of blocks of which none was ever stored."""
        self._plain_free += blocks

    def clear(self) -> None:
        """Forget all content that nobody holds."""
        for block in self._cached_free:
            self._forget(block)
        self._plain_free.extend(self._cached_free)
        self._cached_free.clear()

    def begin_recording(self) -> None:
        """From now on `drain` tells; the first time of all that is cached."""
        self._record = True
        self._stored, self._removed = dict.fromkeys(self._holder), {}

    def drain(self) -> tuple[list[int], list[int]]:
        """Keys that the cache has now and had not at the last call, and keys that it had and has no more."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored, self._removed = {}, {}
        return stored, removed

    def eviction_order(self) -> list[int]:
        """Keys of the free cached blocks, the next one to go first."""
        return [key for block in self._cached_free if (key := self._key[block]) is not None]

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is None:
            return
        self._key[block] = None
        del self._holder[key]
        if self._record and self._stored.pop(key, 0) == 0:
            self._removed[key] = None
