"""What a worker's watchers are told of its prefix cache and its load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from engine.cache_feed import MIN_PENDING, UPDATE_KEYS, CacheFeed
from engine.open_work import FRONTENDS_S, OpenWork
from engine.protocol import CacheChange
from slipstream import block_keys
from slipstream.background import background
from slipstream.v1.registry_pb2 import Capacity, Load
from slipstream.v1.worker_pb2 import CacheUpdate, Tier

BLOCK_TOKENS = 4


@dataclass(slots=True)
class TellingEngine:
    """The part of an engine that the feed reads."""

    tells: bool = True
    running: int = 0
    changes: asyncio.Queue[CacheChange] = field(default_factory=asyncio.Queue)

    def cache_changes(self) -> AsyncIterator[CacheChange] | None:
        return self._changes() if self.tells else None

    async def _changes(self) -> AsyncIterator[CacheChange]:
        while True:
            yield await self.changes.get()
            self.changes.task_done()

    def capacity(self) -> Capacity:
        return Capacity(block_tokens=BLOCK_TOKENS)

    def load(self) -> Load:
        return Load(running=self.running, blocks_used=3)

    async def change(self, *changes: CacheChange) -> None:
        for change in changes:
            self.changes.put_nowait(change)
        await self.changes.join()


@pytest.fixture
def engine() -> TellingEngine:
    return TellingEngine()


@pytest.fixture
def work() -> OpenWork:
    return OpenWork()


@pytest.fixture
async def feed(engine: TellingEngine, work: OpenWork) -> AsyncIterator[CacheFeed]:
    feed = CacheFeed(engine, work, model="m", epoch=7, profile=b"{}")  # type: ignore[arg-type]
    async with background(feed.follow(), name="feed"):
        yield feed


class Watcher:
    """Applies updates as a frontend does."""

    def __init__(self, feed: CacheFeed, frontend_id: str = "f") -> None:
        self._updates = feed.updates(frontend_id, 0)
        self.blocks: set[int] = set()
        self.host: set[int] = set()
        self.load = Load()
        self.own = Load()
        self.snapshots = 0
        self.heard = 0

    async def hear(self) -> CacheUpdate:
        async with asyncio.timeout(5):
            update = await anext(self._updates)
        assert (update.epoch, update.sequence) == (7, self.heard)
        self.heard += 1
        if update.snapshot:
            self.snapshots += 1
            self.blocks, self.host = set(), set()
        blocks = self.host if update.tier == Tier.TIER_HOST else self.blocks
        blocks |= set(update.stored)
        blocks -= set(update.removed)
        if update.HasField("load"):
            self.load, self.own = update.load, update.own
        return update

    async def hear_until_blocks(self, blocks: set[int]) -> None:
        while self.blocks != blocks:
            await self.hear()

    async def aclose(self) -> None:
        await self._updates.aclose()


async def test_a_watcher_hears_everything_first_and_then_what_changes(engine: TellingEngine, feed: CacheFeed) -> None:
    await engine.change(CacheChange([1, 2, 3]), CacheChange(removed=[2]))
    async with aclosing(Watcher(feed)) as watcher:
        first = await watcher.hear()
        assert (first.snapshot, first.blocks_known, first.profile) == (True, True, b"{}")
        assert watcher.blocks == {1, 3}
        await engine.change(CacheChange([4], [1]))
        second = await watcher.hear()
        assert (list(second.stored), list(second.removed), second.snapshot, second.profile) == ([4], [1], False, b"")
        assert feed.watchers == 1
    assert feed.watchers == 0


async def test_changes_between_two_updates_travel_together_and_the_last_word_counts(
    engine: TellingEngine, feed: CacheFeed
) -> None:
    async with aclosing(Watcher(feed)) as watcher:
        await watcher.hear()
        await engine.change(CacheChange([1, 2]), CacheChange([3], [1]), CacheChange([1]), CacheChange(removed=[2]))
        update = await watcher.hear()
        assert (sorted(update.stored), list(update.removed)) == ([1, 3], [2])


async def test_a_reset_is_told_as_a_snapshot(engine: TellingEngine, feed: CacheFeed) -> None:
    await engine.change(CacheChange([1, 2]))
    async with aclosing(Watcher(feed)) as watcher:
        await watcher.hear()
        await engine.change(CacheChange([5], reset=True))
        assert (await watcher.hear()).snapshot
        assert watcher.blocks == {5}


async def test_a_watcher_that_does_not_read_is_not_saved_up_for_and_gets_all_anew(
    engine: TellingEngine, feed: CacheFeed
) -> None:
    async with aclosing(Watcher(feed)) as slow:
        await slow.hear()
        for start in range(0, 3 * MIN_PENDING, 8):  # the cache turns over: 16 blocks fit
            await engine.change(CacheChange(range(start, start + 8), range(max(0, start - 16), max(0, start - 8))))
        pending = [sum(map(len, one.changes.values())) for one in feed._watchers]
        assert max(pending) <= MIN_PENDING
        await slow.hear_until_blocks(set(range(3 * MIN_PENDING - 16, 3 * MIN_PENDING)))
        assert slow.snapshots == 2


async def test_a_large_cache_comes_in_pieces_and_changes_after_them(engine: TellingEngine, feed: CacheFeed) -> None:
    count = 2 * UPDATE_KEYS + 5
    await engine.change(CacheChange(range(1, count + 1)))
    async with aclosing(Watcher(feed)) as watcher:
        assert len((await watcher.hear()).stored) == UPDATE_KEYS
        await engine.change(CacheChange(removed=[count]))  # it is in a piece that has yet to come
        await watcher.hear_until_blocks(set(range(1, count)))
        assert watcher.snapshots == 1


async def test_tiers_are_told_apart(engine: TellingEngine, feed: CacheFeed) -> None:
    await engine.change(CacheChange([1]), CacheChange([1, 2], tier=Tier.TIER_HOST))
    async with aclosing(Watcher(feed)) as watcher:
        await watcher.hear()
        await watcher.hear()
        assert (watcher.blocks, watcher.host) == ({1}, {1, 2})
        await engine.change(CacheChange(removed=[1]))
        await watcher.hear()
        assert (watcher.blocks, watcher.host) == (set(), {1, 2})


async def test_an_engine_that_does_not_tell_has_its_load_told(work: OpenWork) -> None:
    feed = CacheFeed(TellingEngine(tells=False), work, model="m", epoch=7)  # type: ignore[arg-type]
    async with aclosing(Watcher(feed)) as watcher:
        first = await watcher.hear()
        assert (first.snapshot, first.blocks_known, first.load.blocks_used) == (True, False, 3)


async def test_a_request_counts_from_its_acceptance_and_is_told_at_once(feed: CacheFeed, work: OpenWork) -> None:
    async with aclosing(Watcher(feed, "mine")) as watcher:
        await watcher.hear()
        with work.begun("other", range(100), computes=True, generates=False):
            await watcher.hear()
            assert (watcher.load.waiting, watcher.load.waiting_tokens, watcher.load.context_tokens) == (1, 100, 0)
            assert watcher.own == Load()
        await watcher.hear()
        assert watcher.load == Load(blocks_used=3, frontends=1)


async def test_of_the_load_a_watcher_knows_what_is_its_own(
    engine: TellingEngine, feed: CacheFeed, work: OpenWork
) -> None:
    async with aclosing(Watcher(feed, "mine")) as watcher:
        await watcher.hear()
        engine.running = 1
        with (
            work.begun("mine", range(30), computes=True, generates=True),
            work.begun("other", range(50), computes=False, generates=True),
        ):
            while watcher.load.running + watcher.load.waiting < 2:
                await watcher.hear()
            assert watcher.load == Load(
                running=1, waiting=1, blocks_used=3, waiting_tokens=30, context_tokens=80, frontends=2
            )
            assert watcher.own == Load(running=1, waiting_tokens=30, context_tokens=30)


def test_frontends_count_while_they_have_requests_open_and_some_seconds_longer() -> None:
    now_s = 100.0
    work = OpenWork(clock=lambda: now_s)
    with work.begun("a", [1], computes=True, generates=False):
        with work.begun("b", [1], computes=True, generates=False):
            pass
        assert work.load(Load()).frontends == 2
        now_s += FRONTENDS_S + 1
        assert work.load(Load()).frontends == 1, "one whose request takes long is not forgotten"
    assert work.load(Load()).frontends == 1
    now_s += FRONTENDS_S + 1
    assert work.load(Load()).frontends == 0


async def test_a_prompt_shrinks_by_the_blocks_that_are_in_the_cache(
    engine: TellingEngine, feed: CacheFeed, work: OpenWork
) -> None:
    prompt = list(range(18))
    keys = block_keys.extend(block_keys.root_key("m", BLOCK_TOKENS), prompt, BLOCK_TOKENS)
    await engine.change(CacheChange(keys[:1]))
    with work.begun("f", prompt, computes=True, generates=False) as request:
        assert work.load(Load()).waiting_tokens == 14, "a prefix hit"
        await engine.change(CacheChange(keys[1:3]))
        assert work.load(Load()).waiting_tokens == 6, "a chunk was computed"
        request.computed()
        assert work.load(Load()) == Load(frontends=1), "what is left is a lease"


async def test_a_sequence_grows_with_its_tokens(feed: CacheFeed, work: OpenWork) -> None:
    async with aclosing(Watcher(feed)) as watcher:
        await watcher.hear()
        with work.begun("f", range(10), computes=True, generates=True) as request:
            request.generated(1)
            while watcher.load.context_tokens != 11:
                await watcher.hear()
            assert watcher.load.waiting_tokens == 0
            request.generated(4)  # nobody is woken by this
            while watcher.load.context_tokens != 15:
                await watcher.hear()


async def test_closing_the_feed_ends_its_watches(feed: CacheFeed) -> None:
    async with aclosing(Watcher(feed)) as watcher:
        await watcher.hear()
        feed.close()
        with pytest.raises(StopAsyncIteration):
            await watcher.hear()
