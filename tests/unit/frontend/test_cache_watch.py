"""What a frontend knows of its workers' caches: from a worker's real feed, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc.aio
import numpy as np
import pytest

from engine.cache_feed import UPDATE_KEYS, CacheFeed
from engine.open_work import OpenWork
from engine.protocol import CacheChange
from engine.worker_service import WorkerService
from frontend.cache_watch import CacheWatch
from frontend.known_caches import KnownCaches
from frontend.worker_channels import WorkerChannels
from slipstream.background import background
from slipstream.performance import Profile
from slipstream.v1 import worker_pb2_grpc
from slipstream.v1.registry_pb2 import Capacity, Load, WorkerRecord, WorkerState
from slipstream.v1.worker_pb2 import CacheUpdate, Tier

FRONTEND = "frontend-1"


@dataclass(slots=True)
class Listener:
    """What the router hears."""

    loads: dict[str, tuple[Load, Load]] = field(default_factory=dict)
    profiles: dict[str, Profile | None] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def note_load(self, worker_id: str, load: Load, own: Load, now_s: float) -> None:
        self.loads[worker_id] = load, own

    def note_profile(self, worker_id: str, profile: Profile | None) -> None:
        self.profiles[worker_id] = profile

    def lose_feed(self, worker_id: str) -> None:
        self.lost.append(worker_id)


class CachingWorker:
    """A worker's feed on a real server; `changes` stands for its engine."""

    def __init__(self, worker_id: str = "w", epoch: int = 1, *, tells: bool = True) -> None:
        self.record = WorkerRecord(worker_id=worker_id, epoch=epoch, state=WorkerState.READY)
        self.changes: asyncio.Queue[CacheChange] = asyncio.Queue()
        self.work = OpenWork()
        self._tells = tells
        self._stack = AsyncExitStack()

    def cache_changes(self) -> AsyncIterator[CacheChange] | None:
        return self._changes() if self._tells else None

    async def _changes(self) -> AsyncIterator[CacheChange]:
        while True:
            yield await self.changes.get()

    def capacity(self) -> Capacity:
        return Capacity(block_tokens=4)

    def load(self) -> Load:
        return Load()

    async def __aenter__(self) -> CachingWorker:
        self.feed = CacheFeed(self, self.work, model="m", epoch=self.record.epoch)  # type: ignore[arg-type]
        await self._stack.enter_async_context(background(self.feed.follow(), name="feed"))
        self.server = grpc.aio.server()
        service = WorkerService(lambda: self.record, lambda role: None, self, self.feed, lambda fenced, because: None)  # type: ignore[arg-type]
        worker_pb2_grpc.add_WorkerServicer_to_server(service, self.server)
        wanted = self.record.address or "127.0.0.1:0"
        self.record.address = f"127.0.0.1:{self.server.add_insecure_port(wanted)}"
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(None)
        await self._stack.aclose()

    def stores(self, *keys: int) -> None:
        self.changes.put_nowait(CacheChange(keys))

    def removes(self, *keys: int) -> None:
        self.changes.put_nowait(CacheChange(removed=keys))


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def caches(listener: Listener) -> KnownCaches:
    return KnownCaches(listener)


@pytest.fixture
async def watch(caches: KnownCaches) -> AsyncIterator[CacheWatch]:
    async with WorkerChannels() as channels, CacheWatch(caches, channels, frontend_id=FRONTEND) as watch:
        yield watch


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another component
            await asyncio.sleep(0.01)


async def test_an_engine_that_fills_blocks_is_seen_to_compute(watch: CacheWatch, caches: KnownCaches) -> None:
    async with CachingWorker("a") as telling, CachingWorker("b", tells=False) as silent:
        await watch.retain([telling.record, silent.record])
        await until(lambda: caches.signs.last_s("a") is not None)
        first_s = caches.signs.last_s("a")
        assert first_s is not None
        telling.stores(1)
        await until(lambda: (caches.signs.last_s("a") or 0.0) > first_s)
        assert caches.signs.last_s("b") is None
        await watch.retain([silent.record])
        assert caches.signs.last_s("a") is None


async def test_a_frontend_knows_what_its_workers_have(watch: CacheWatch, caches: KnownCaches) -> None:
    async with CachingWorker("a") as first, CachingWorker("b") as second:
        await watch.retain([first.record, second.record])
        first.stores(1, 2, 3)
        second.stores(1, 2)
        await until(lambda: caches.blocks([1, 2, 3, 4]) == {"a": 3, "b": 2})
        first.removes(3, 2)
        await until(lambda: caches.blocks([1, 2, 3, 4]) == {"a": 1, "b": 2})
        assert caches.tells_blocks("a", 1)
        assert not caches.tells_blocks("a", 2), "another incarnation has not told yet"


async def test_a_frontend_that_comes_later_learns_the_same(watch: CacheWatch, caches: KnownCaches) -> None:
    async with CachingWorker() as worker:
        worker.stores(*range(1, 2 * UPDATE_KEYS + 2))
        await until(lambda: worker.changes.empty())
        await watch.retain([worker.record])
        await until(lambda: caches.blocks(range(1, 3 * UPDATE_KEYS)) == {"w": 2 * UPDATE_KEYS + 1})


async def test_of_a_busy_worker_a_frontend_knows_what_is_its_own(watch: CacheWatch, listener: Listener) -> None:
    async with CachingWorker() as worker:
        await watch.retain([worker.record])
        with (
            worker.work.begun(FRONTEND, range(9), computes=True, generates=True),
            worker.work.begun("another", range(20), computes=True, generates=False),
        ):
            await until(lambda: "w" in listener.loads and listener.loads["w"][0].waiting == 2)
            load, own = listener.loads["w"]
            assert (load.waiting_tokens, load.context_tokens) == (29, 9)
            assert (own.running + own.waiting, own.waiting_tokens, own.context_tokens) == (1, 9, 9)


async def test_a_worker_that_was_restarted_has_nothing_any_more(
    watch: CacheWatch, caches: KnownCaches, listener: Listener
) -> None:
    async with CachingWorker() as worker:
        await watch.retain([worker.record])
        worker.stores(1, 2)
        await until(lambda: caches.blocks([1, 2]) == {"w": 2})
    await until(lambda: listener.lost == ["w"])
    assert caches.blocks([1, 2]) == {"w": 2}, "it may only be out of reach"
    async with CachingWorker(epoch=2) as again:
        await watch.retain([again.record])
        await until(lambda: caches.tells_blocks("w", 2))
        assert caches.blocks([1, 2]) == {}
        again.stores(1)
        await until(lambda: caches.blocks([1, 2]) == {"w": 1})


async def test_a_feed_that_broke_is_taken_up_again_with_everything(watch: CacheWatch, caches: KnownCaches) -> None:
    async with CachingWorker() as worker:
        await watch.retain([worker.record])
        worker.stores(1, 2)
        await until(lambda: caches.blocks([1, 2]) == {"w": 2})
    again = CachingWorker()  # the same incarnation, as after a broken connection
    again.record.CopyFrom(worker.record)
    async with again:
        again.stores(1)
        await until(lambda: caches.blocks([1, 2]) == {"w": 1})


async def test_a_worker_that_leaves_is_forgotten(watch: CacheWatch, caches: KnownCaches) -> None:
    async with CachingWorker("a") as first, CachingWorker("b") as second:
        await watch.retain([first.record, second.record])
        first.stores(1)
        second.stores(1)
        await until(lambda: caches.blocks([1]) == {"a": 1, "b": 1})
        await watch.retain([second.record])
        assert caches.blocks([1]) == {"b": 1}
        await until(lambda: first.feed.watchers == 0)
        assert caches.get("a") is None


async def test_one_frontends_end_takes_nothing_from_another(watch: CacheWatch, caches: KnownCaches) -> None:
    others = KnownCaches()
    async with CachingWorker() as worker:
        await watch.retain([worker.record])
        async with WorkerChannels() as channels, CacheWatch(others, channels, frontend_id="2") as other:
            await other.retain([worker.record])
            worker.stores(1)
            await until(lambda: others.blocks([1]) == {"w": 1})
        worker.stores(2)
        await until(lambda: caches.blocks([1, 2]) == {"w": 2})
        assert worker.feed.watchers == 1


async def test_of_a_worker_without_events_only_the_load_is_known(watch: CacheWatch, caches: KnownCaches) -> None:
    async with CachingWorker(tells=False) as worker:
        await watch.retain([worker.record])
        await until(lambda: caches.get("w") is not None)
        assert not caches.tells_blocks("w", 1)


def test_a_block_in_host_memory_counts_until_it_is_nowhere(caches: KnownCaches) -> None:
    caches.apply("w", CacheUpdate(epoch=1, snapshot=True, stored=[1, 2], blocks_known=True), 0.0)
    caches.apply("w", CacheUpdate(epoch=1, sequence=1, stored=[1, 2, 3], tier=Tier.TIER_HOST, blocks_known=True), 0.0)
    assert caches.blocks([1, 2, 3]) == {"w": 3}
    caches.apply("w", CacheUpdate(epoch=1, sequence=2, removed=[1, 2], blocks_known=True), 0.0)
    assert caches.blocks([1, 2, 3]) == {"w": 3}
    caches.apply("w", CacheUpdate(epoch=1, sequence=3, removed=[2, 3], tier=Tier.TIER_HOST, blocks_known=True), 0.0)
    assert caches.blocks([1, 2, 3]) == {"w": 1}


def test_a_snapshot_replaces_everything_and_a_profile_that_is_none_is_left_out(
    caches: KnownCaches, listener: Listener
) -> None:
    first = np.arange(1, 50).tolist()
    caches.apply("w", CacheUpdate(epoch=1, snapshot=True, stored=first, blocks_known=True, profile=b"not json"), 0.0)
    assert caches.blocks(first) == {"w": 49}
    assert listener.profiles == {}
    caches.apply("w", CacheUpdate(epoch=1, snapshot=True, stored=[1, 2], blocks_known=True), 0.0)
    assert caches.blocks(first) == {"w": 2}


def test_the_router_reads_a_vector_by_its_own_places(caches: KnownCaches) -> None:
    caches.apply("early", CacheUpdate(epoch=1, snapshot=True, stored=[1, 2, 3], blocks_known=True), 0.0)
    assert caches.blocks_by_slot([1, 2, 3], 2) is not None, "it has no place yet"
    caches.place({"late": 0, "early": 1})
    caches.apply("late", CacheUpdate(epoch=1, snapshot=True, stored=[1], blocks_known=True), 0.0)
    caches.apply("late", CacheUpdate(epoch=1, sequence=1, stored=[1, 2], tier=Tier.TIER_HOST, blocks_known=True), 0.0)
    found = caches.blocks_by_slot([1, 2, 3], 2)
    assert found is not None
    assert [found.at(slot) for slot in range(2)] == [2, 3]
    caches.place({"late": 0})
    found = caches.blocks_by_slot([1, 2, 3], 2)
    assert found is not None
    assert [found.at(slot) for slot in range(2)] == [2, 0], "a worker without a place is nobody"
    assert caches.blocks_by_slot([7], 2) is None
