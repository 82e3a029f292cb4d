"""Requests for a model without a worker: who waits, what the planner hears of it, who is refused."""

from __future__ import annotations

import asyncio

import pytest

from frontend.cold_start import HEARD_S, ColdStarts
from slipstream.errors import NoWorkerError


class Time:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_request_waits_until_the_model_is_served_and_is_told_as_queued() -> None:
    time, served = Time(), False
    cold = ColdStarts(8, clock=time)
    cold.take({"m": 5.0})
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(cold.wait("m", "realtime", 60.0, lambda: served))
        await asyncio.sleep(0)
        time.now_s += 2.0
        (name, queued), *_ = cold.queued().items()
        assert name == ("m", "realtime")
        assert (queued.requests, queued.oldest_wait_s) == (1, 2.0)
        served = True
    assert waiting.result() is None
    assert cold.queued() == {}


async def test_whoever_cannot_be_served_in_time_is_told_when_the_worker_will_be_there() -> None:
    time = Time()
    cold = ColdStarts(8, clock=time)
    cold.take({"m": 30.0})
    with pytest.raises(NoWorkerError, match=r"30\.0 s to start") as refused:
        await cold.wait("m", "realtime", 10.0, lambda: False)
    assert refused.value.retry_after_s == 30.0
    # Another one can wait; when it has waited for 25 s, ten seconds are enough.
    waiting = asyncio.create_task(cold.wait("m", "realtime", 60.0, lambda: time.now_s > 125.0))
    await asyncio.sleep(0)
    time.now_s += 25.0
    cold.take({"m": 30.0})
    second = asyncio.create_task(cold.wait("m", "batch", 10.0, lambda: time.now_s > 125.0))
    await asyncio.sleep(0)
    assert len(cold.queued()) == 2
    time.now_s += 1.0
    await asyncio.gather(waiting, second)


async def test_a_worker_that_never_comes_is_not_awaited_for_ever_and_no_more_than_some_wait() -> None:
    time = Time()
    cold = ColdStarts(1, clock=time)
    cold.take({"m": 4.0})
    waiting = asyncio.create_task(cold.wait("m", "realtime", 600.0, lambda: False))
    await asyncio.sleep(0)
    with pytest.raises(NoWorkerError, match="1 requests wait"):
        await cold.wait("m", "realtime", 600.0, lambda: False)
    time.now_s += 13.0
    with pytest.raises(NoWorkerError, match="none has come within 12 s"):
        await waiting
    assert cold.queued() == {}


async def test_where_no_planner_starts_workers_or_is_heard_no_more_nobody_waits() -> None:
    time = Time()
    cold = ColdStarts(8, clock=time)
    cold.take({"m": 1.0})
    assert cold.starts("m")
    assert not cold.starts("other")
    time.now_s += HEARD_S
    assert not cold.starts("m")
    with pytest.raises(NoWorkerError):
        await cold.wait("m", "realtime", 600.0, lambda: False)
