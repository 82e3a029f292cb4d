"""vLLM's events in the cluster's keys: the translation, and the way from vLLM's own publisher."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from engine.protocol import CacheChange
from engine.vllm_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventSocket,
    Hash,
    Translation,
    remove_stale,
)
from slipstream.block_keys import extend, root_key

SIZE = 4
TOKENS = list(range(40))
KEYS = extend(root_key("m", SIZE), TOKENS, SIZE)
HASHES: list[Hash] = list(range(100, 110))


def stored(first: int, last: int, *, group: int = 0, **others: object) -> BlockStored:
    """vLLM's word for blocks `first` to `last` of TOKENS."""
    return BlockStored(
        block_hashes=[*HASHES[first:last]],
        parent_block_hash=HASHES[first - 1] if first else None,
        token_ids=TOKENS[SIZE * first : SIZE * last],
        block_size=SIZE,
        group_idx=group,
        **others,  # type: ignore[arg-type]
    )


def removed(*blocks: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=[HASHES[block] for block in blocks])


@pytest.fixture
def translation() -> Translation:
    return Translation("m", SIZE)


def test_blocks_get_the_keys_that_frontends_compute(translation: Translation) -> None:
    assert translation.change([stored(0, 2)]) == CacheChange(KEYS[:2], [])
    assert translation.change([stored(2, 5)]) == CacheChange(KEYS[2:5], [])
    assert translation.change([removed(4)]) == CacheChange([], [KEYS[4]])


def test_a_block_that_vllm_holds_twice_is_there_until_the_last_copy_goes(translation: Translation) -> None:
    assert translation.change([stored(0, 1), stored(0, 1)]) == CacheChange(KEYS[:1], [])
    assert translation.change([removed(0)]) == CacheChange([], [])
    assert translation.change([removed(0)]) == CacheChange([], KEYS[:1])
    assert len(translation) == 0, "what is not there is not remembered"


def test_what_came_and_went_in_one_step_is_not_told(translation: Translation) -> None:
    assert translation.change([stored(0, 2), removed(1)]) == CacheChange(KEYS[:1], [])
    assert translation.change([removed(0), stored(0, 1)]) == CacheChange([], [])


def test_clearing_the_cache_resets(translation: Translation) -> None:
    translation.change([stored(0, 2)])
    assert translation.change([stored(2, 3), AllBlocksCleared(), stored(0, 1)]) == CacheChange(KEYS[:1], [], reset=True)


def test_a_salt_comes_with_the_first_block_and_holds_for_those_after_it(translation: Translation) -> None:
    salted = extend(root_key("m", SIZE, "acme"), TOKENS, SIZE)
    first = stored(0, 2, extra_keys=[["acme"], None])

    assert translation.change([first, stored(2, 3)]) == CacheChange(salted[:3], [])
    assert translation.change([removed(0)]) == CacheChange([], salted[:1])
    assert not set(salted) & set(KEYS)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(stored(3, 4), id="its parent is not known"),
        pytest.param(stored(0, 1, lora_name="poet"), id="an adapter"),
        pytest.param(stored(0, 1, extra_keys=[[["image", 0]]]), id="an image"),
        pytest.param(stored(0, 1, extra_keys=[["acme", "more"]]), id="a salt and more"),
        pytest.param(stored(0, 2, extra_keys=[["acme"], ["more"]]), id="more at a later block"),
        pytest.param(stored(0, 1, group=1), id="another group of layers"),
        pytest.param(stored(0, 1, medium="CPU"), id="another medium"),
        pytest.param(BlockStored(HASHES[:1], None, TOKENS[:2], 2), id="a block of another size"),
        pytest.param(removed(0), id="never stored"),
    ],
)
def test_what_has_no_key_is_left_out(translation: Translation, event: BlockStored) -> None:
    assert translation.change([event]) == CacheChange([], [])
    assert len(translation) == 0


class Publisher:
    """vLLM's own, with its own event types."""

    def __init__(self, events: EventSocket, *, kept: int = 1000) -> None:
        from vllm.distributed import kv_events

        self._types = kv_events
        self._publisher = kv_events.ZmqEventPublisher(
            0, endpoint=events.endpoint, replay_endpoint=events.replay_endpoint, buffer_steps=kept
        )

    def publish(self, events: Sequence[BlockStored | BlockRemoved]) -> None:
        types = self._types
        made = [
            types.BlockStored(
                block_hashes=[*one.block_hashes],
                parent_block_hash=one.parent_block_hash,
                token_ids=one.token_ids,
                block_size=one.block_size,
                lora_id=None,
                medium="GPU",
                lora_name=None,
                extra_keys=[None] * len(one.block_hashes),
                group_idx=0,
            )
            if isinstance(one, BlockStored)
            else types.BlockRemoved(block_hashes=[*one.block_hashes], medium="GPU", group_idx=0)
            for one in events
        ]
        self._publisher.publish(types.KVEventBatch(ts=0.0, events=made))

    def sent(self) -> None:
        """Return when all that was published is on its way."""
        self._publisher._event_queue.join()

    def shutdown(self) -> None:
        self._publisher.shutdown()


@pytest.fixture
def socket() -> Iterator[EventSocket]:
    socket = EventSocket()
    yield socket
    socket.close()


async def collect(changes: AsyncIterator[CacheChange], *, until: int) -> list[CacheChange]:
    """Changes until so many keys have been stored."""
    found: list[CacheChange] = []
    async with asyncio.timeout(10):
        while sum(len(change.stored) for change in found) < until:
            found.append(await anext(changes))
    return found


async def test_events_come_from_vllms_publisher_even_those_before_the_subscription(
    socket: EventSocket, translation: Translation
) -> None:
    publisher = Publisher(socket)
    try:
        publisher.publish([stored(0, 2)])
        publisher.publish([stored(2, 3), removed(1)])
        async with aclosing(socket.changes(translation)) as changes:
            await collect(changes, until=3)
            publisher.publish([stored(3, 4)])
            assert await collect(changes, until=1) == [CacheChange(KEYS[3:4], [])]
    finally:
        publisher.shutdown()


async def test_messages_that_were_lost_are_asked_for_again(socket: EventSocket, translation: Translation) -> None:
    publisher = Publisher(socket)
    try:
        publisher.publish([stored(0, 1)])
        async with aclosing(socket.changes(translation)) as changes:
            await collect(changes, until=1)
            publisher.publish([stored(1, 2)])
            await collect(changes, until=1)
            socket._next = 1  # as if the second one had not come
            translation.change([removed(1)])
            publisher.publish([stored(2, 3)])
            assert await collect(changes, until=2) == [CacheChange(KEYS[1:2], []), CacheChange(KEYS[2:3], [])]
    finally:
        publisher.shutdown()


async def test_when_vllm_has_not_kept_them_nothing_that_was_known_holds(
    socket: EventSocket, translation: Translation
) -> None:
    publisher = Publisher(socket, kept=1)
    try:
        publisher.publish([stored(0, 1)])
        publisher.publish([removed(0)])
        publisher.publish([stored(0, 1)])
        publisher.sent()  # one that goes out between question and subscription is missed only when the next one comes
        async with aclosing(socket.changes(translation)) as changes:
            assert await collect(changes, until=1) == [CacheChange(reset=True), CacheChange(KEYS[:1], [])]
    finally:
        publisher.shutdown()


def test_the_folder_of_a_worker_that_was_killed_is_removed(socket: EventSocket) -> None:
    made = "from engine.vllm_events import EventSocket; print(EventSocket()._folder)"
    left = Path(subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True).stdout.strip())
    assert left.is_dir()
    remove_stale()
    assert not left.exists()
    assert socket._folder.is_dir(), "its worker lives"
    assert socket._folder.stat().st_mode & 0o077 == 0, "tokens pass through it"
    assert socket._folder.parent == Path(tempfile.gettempdir())
