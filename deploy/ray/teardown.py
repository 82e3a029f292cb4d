"""`slipstream down --on ray`: every worker of a named cluster ends, whoever has started it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from deploy.ray.joining import joined
from deploy.ray.places import Places
from slipstream.errors import DeadlineError
from slipstream.settings import Settings

_POLL_S = 0.5
_REMOVE_TIMEOUT_S = 10.0


def end_cluster(settings: Settings, *, timeout_s: float, now: bool) -> list[str]:
    """Drain the workers of the settings' cluster, wait, and remove all that is left; returns the worker ids.

    Args:
        timeout_s: longest that the drains may take; what runs then is killed.
        now: kill at once.

    Raises:
        StartupError: the Ray cluster cannot be joined.
        DeadlineError: something is left after all.
    """
    with joined(settings.ray.address, start=False):
        return asyncio.run(_end(Places(settings.cluster.name), 0.0 if now else timeout_s))


async def _end(places: Places, timeout_s: float) -> list[str]:
    names = sorted(await places.names() | await places.groups())
    if timeout_s > 0:
        await asyncio.gather(*(places.drain(name) for name in names), return_exceptions=True)
    await _gone(places.names, timeout_s)
    for name in await places.groups():
        await places.forget(name)
    if left := await _gone(places.groups, _REMOVE_TIMEOUT_S):
        raise DeadlineError(f"{', '.join(sorted(left))} did not go within {_REMOVE_TIMEOUT_S:g} s")
    return names


async def _gone(look: Callable[[], Coroutine[Any, Any, set[str]]], timeout_s: float) -> set[str]:
    """What is left after so long; nothing as soon as nothing is."""
    ends_s = time.monotonic() + timeout_s
    while True:
        left = await look()
        if not left or time.monotonic() > ends_s:
            return left
        await asyncio.sleep(_POLL_S)
