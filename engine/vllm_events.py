"""What vLLM's engine core tells of its prefix cache, in the cluster's own keys.

vLLM publishes each step's events over ZeroMQ, here through a socket in a folder that only this user can enter. They
name blocks by vLLM's hashes and bring the tokens; from these and the block before, a key of slipstream.block_keys
is made. vLLM's numbers of the messages show when one is missing; it is asked for again then.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import zmq
import zmq.asyncio

from engine.protocol import CacheChange
from slipstream import block_keys, telemetry

log = telemetry.get_logger(__name__)

_PREFIX = "slipstream-events-"
_UNFINISHED = "slipstream-unfinished-events-"
_REPLAY_TIMEOUT_S = 3.0
_REPLAY_END = (-1).to_bytes(8, "big", signed=True)
_DEVICE_MEDIA = (None, "GPU")  # vLLM's word for the engine's own cache, also on a CPU

Hash = int | bytes
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class _Event(msgspec.Struct, tag=True):
    """Fields that are not used here are skipped when an event is read."""


class BlockStored(_Event):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[TokenId]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[object] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(_Event):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(_Event):
    """The cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True):
    """One message: the events of one engine step."""

    ts: float
    events: list[Event]


class Translation:
    """Turns vLLM's events into changes. Plain data.

    vLLM may hold a block more than once: it is stored with the first copy and removed with the last. A salt comes with
    the first block of a prompt. Blocks that are told apart by more than that (adapters, images) have no key here and
    are left out.
    """

    def __init__(self, model: str, block_tokens: int) -> None:
        self._model = model
        self._block_tokens = block_tokens
        self._keys: dict[Hash, int] = {}
        self._copies: dict[Hash, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def change(self, events: Sequence[Event]) -> CacheChange:
        """What the events of one step, or of several, come to."""
        stored: dict[int, None] = {}
        removed: dict[int, None] = {}
        reset = False
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.clear()
                stored, removed, reset = {}, {}, True
            elif event.medium not in _DEVICE_MEDIA or event.group_idx not in (None, 0):
                continue  # all groups of layers have the same prefix, but for windows: the first one tells
            elif isinstance(event, BlockStored):
                for key in self._store(event):
                    if key in removed:
                        del removed[key]
                    else:
                        stored[key] = None
            else:
                for key in self._remove(event):
                    if key in stored:
                        del stored[key]
                    else:
                        removed[key] = None
        return CacheChange(stored=list(stored), removed=list(removed), reset=reset)

    def clear(self) -> None:
        """Nothing is known to be in the cache any more."""
        self._keys.clear()
        self._copies.clear()

    def _store(self, event: BlockStored) -> Iterator[int]:
        hashes, size = event.block_hashes, event.block_size
        parent = self._parent(event)
        if (
            parent is None
            or event.lora_name is not None
            or size != self._block_tokens
            or len(event.token_ids) != size * len(hashes)
        ):
            return
        for one, key in zip(hashes, block_keys.extend(parent, event.token_ids, size), strict=True):
            copies = self._copies.get(one, 0)
            self._copies[one] = copies + 1
            if copies == 0:
                self._keys[one] = key
                yield key

    def _parent(self, event: BlockStored) -> int | None:
        """The key that the first of these blocks is chained to; None: they have no keys."""
        first, *others = event.extra_keys or [None]
        if any(others):
            return None
        if event.parent_block_hash is not None:
            return None if first else self._keys.get(event.parent_block_hash)
        match first:
            case None | []:
                salt = ""
            case [str(salt)]:
                pass
            case _:
                return None
        return block_keys.root_key(self._model, self._block_tokens, salt)

    def _remove(self, event: BlockRemoved) -> Iterator[int]:
        for one in event.block_hashes:
            copies = self._copies.pop(one, 0)
            if copies > 1:
                self._copies[one] = copies - 1
            elif copies == 1:
                yield self._keys.pop(one)


class EventSocket:
    """Where one engine core publishes: made before it starts, read by `changes`, and removed by `close`."""

    def __init__(self) -> None:
        remove_stale()
        self._folder, self._lock = _own_folder()
        self.endpoint = f"ipc://{self._folder}/events"
        self.replay_endpoint = f"ipc://{self._folder}/replay"
        self._decoder = msgspec.msgpack.Decoder(EventBatch)
        self._next = 0

    async def changes(self, translation: Translation) -> AsyncGenerator[CacheChange, None]:
        """Every change, from the engine's first step on; the engine core must run."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as events:
            events.setsockopt(zmq.LINGER, 0)
            events.setsockopt(zmq.RCVHWM, 0)
            events.subscribe(b"")
            events.connect(self.endpoint)
            for change in await self._missed(context, translation):  # what came before the subscription
                yield change
            while True:
                _, number, payload = await events.recv_multipart()
                sequence = int.from_bytes(number, "big")
                if sequence > self._next:
                    for change in await self._missed(context, translation):
                        yield change
                if sequence == self._next:
                    self._next += 1
                    yield translation.change(self._decoder.decode(payload).events)

    def close(self) -> None:
        """Remove the folder. Again is fine."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def _missed(self, context: zmq.asyncio.Context, translation: Translation) -> list[CacheChange]:
        """The changes of the messages that did not come, as far as vLLM still has them.

        When it has not, what was known is forgotten: blocks that it has dropped meanwhile could not be told from
        others. What is stored from now on is known again.
        """
        changes = []
        try:
            async with asyncio.timeout(_REPLAY_TIMEOUT_S):
                messages = await self._replay(context)
        except TimeoutError:
            log.warning("cache_events_silent", limit_s=_REPLAY_TIMEOUT_S)
            return []
        if messages and messages[0][0] > self._next:
            log.warning("cache_events_lost", expected=self._next, got=messages[0][0])
            translation.clear()
            changes.append(CacheChange(reset=True))
        for sequence, payload in messages:
            changes.append(translation.change(self._decoder.decode(payload).events))
            self._next = sequence + 1
        return changes

    async def _replay(self, context: zmq.asyncio.Context) -> list[tuple[int, bytes]]:
        messages: list[tuple[int, bytes]] = []
        with context.socket(zmq.DEALER) as asking:
            asking.setsockopt(zmq.LINGER, 0)
            asking.connect(self.replay_endpoint)
            await asking.send_multipart([b"", self._next.to_bytes(8, "big")])
            while True:
                *_, number, payload = await asking.recv_multipart()
                if number == _REPLAY_END:
                    return messages
                messages.append((int.from_bytes(number, "big"), payload))


def remove_stale() -> None:
    """Remove the folders of workers that were killed.

    An owner holds a lock on its folder, and the kernel drops the lock when it dies. A process id would not do: workers
    in containers of their own may share a folder without seeing each other's processes.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or just removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)


def _own_folder() -> tuple[Path, int]:
    """A new folder that only this user can enter, and the descriptor that holds its lock."""
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED))
    lock = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Only now under its name: another worker would take an unlocked folder for a dead one's.
    return unfinished.rename(unfinished.with_name(unfinished.name.replace(_UNFINISHED, _PREFIX, 1))), lock
