from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from slipstream.loop_tasks import tasks_shown


def told(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("slipstream_event_loop_tasks")


async def test_a_task_that_never_ends_shows() -> None:
    registry = CollectorRegistry()
    with tasks_shown(registry):
        before = told(registry)
        assert before is not None
        forever = [asyncio.create_task(asyncio.Event().wait()) for _ in range(3)]
        # Read as /metrics is read: from another thread.
        assert await asyncio.to_thread(told, registry) == before + 3
        for one in forever:
            one.cancel()
        await asyncio.gather(*forever, return_exceptions=True)
        assert told(registry) == before
    assert told(registry) is None
