"""Work that runs beside something else and ends with it: every task has an owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None], *, name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Run `work` while the body runs; cancel it and wait for its end when the body is left.

    Unlike a TaskGroup it lets the body's own exceptions through as they are. A failure of `work` is raised
    when the body ends well; whoever must act on it earlier waits for the yielded task too.
    """
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
        failure = None if task.cancelled() else task.exception()
    if failure is not None:
        raise failure
