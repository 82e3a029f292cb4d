"""Work that runs beside something else and ends with it: every task has an owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
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


class first_error:  # noqa: N801 - reads like a function
    """Lets the first error of a TaskGroup in the block through as itself, and not in a group.

    The group, which names the error, and the error's frames, which name the group, are taken apart: as a cycle they
    would keep all that those frames hold until the next full garbage collection, which may be minutes away. The same
    is true of a local name for a task that failed: let go of it when leaving.
    """

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, BaseExceptionGroup):
            return
        first = error.exceptions[0]
        error.__traceback__ = None
        try:
            raise first from None
        finally:
            first.__context__ = None
            del first, error, trace
