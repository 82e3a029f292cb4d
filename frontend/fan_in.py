"""Several streams read as one, in the order their items come; one that fails ends the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from slipstream.background import first_error

T = TypeVar("T")
# Items that may wait for a slow reader, for each stream; beyond that the streams themselves wait.
_QUEUED_ITEMS = 4


@asynccontextmanager
async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncIterator[AsyncIterator[T]]:
    """Read `streams` at the same time. On leaving the block every one of them is closed, read to its end or not.

    Raises:
        The first error any of the streams raised, itself and not in a group.
    """
    if len(streams) == 1:  # by far the most frequent, and it needs no task
        async with aclosing(streams[0]) as only:
            yield only
        return
    queue: asyncio.Queue[T | None] = asyncio.Queue(_QUEUED_ITEMS * len(streams))
    with first_error():
        async with asyncio.TaskGroup() as tasks:
            pumps = [tasks.create_task(_pump(stream, queue)) for stream in streams]
            try:
                yield _drain(queue, len(streams))
            finally:
                while pumps:  # see `first_error`
                    pumps.pop().cancel()


async def _pump(stream: AsyncGenerator[T, None], queue: asyncio.Queue[T | None]) -> None:
    async with aclosing(stream):
        async for item in stream:
            await queue.put(item)
    await queue.put(None)


async def _drain(queue: asyncio.Queue[T | None], open_streams: int) -> AsyncIterator[T]:
    while open_streams:
        item = await queue.get()
        if item is None:
            open_streams -= 1
        else:
            yield item
