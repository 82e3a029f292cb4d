"""Streams read as one: all items, every stream closed, the first error itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from frontend.fan_in import merged


class Source:
    """A stream that remembers whether it was closed."""

    def __init__(self, *items: int | Exception | asyncio.Event) -> None:
        self.items = items
        self.closed = False

    async def read(self) -> AsyncGenerator[int, None]:
        try:
            for item in self.items:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    yield item
        finally:
            self.closed = True


async def read_all(*sources: Source) -> list[int]:
    async with merged([source.read() for source in sources]) as items:
        return [item async for item in items]


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_every_item_comes_once_and_in_its_streams_order(count: int) -> None:
    sources = [Source(*range(place * 100, place * 100 + 20)) for place in range(count)]
    received = await read_all(*sources)
    for place in range(count):
        assert [item for item in received if item // 100 == place] == list(range(place * 100, place * 100 + 20))
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [0, 3])
async def test_an_error_is_raised_as_itself_and_closes_the_others(count: int) -> None:
    others = [Source(asyncio.Event()) for _ in range(count)]
    with pytest.raises(KeyError, match="lost"):
        await read_all(Source(1, KeyError("lost")), *others)
    assert all(source.closed for source in others)


@pytest.mark.parametrize("count", [1, 3])
async def test_leaving_early_closes_streams_that_would_go_on_for_ever(count: int) -> None:
    sources = [Source(1, asyncio.Event()) for _ in range(count)]
    async with merged([source.read() for source in sources]) as items:
        assert await anext(items) == 1
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_readers_own_error_goes_through_unchanged(count: int) -> None:
    sources = [Source(1, asyncio.Event()) for _ in range(count)]
    with pytest.raises(ZeroDivisionError):
        async with merged([source.read() for source in sources]):
            raise ZeroDivisionError
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_cancelling_the_reader_closes_every_stream() -> None:
    sources = [Source(asyncio.Event()) for _ in range(3)]
    reader = asyncio.create_task(read_all(*sources))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert all(source.closed for source in sources)
