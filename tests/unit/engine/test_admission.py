"""How many requests a worker takes, and how it stops taking any."""

import asyncio

import pytest

from engine.admission import Admission
from slipstream.errors import EngineSilentError, UnavailableError, WorkerDrainingError


def test_a_full_worker_refuses_and_says_which_limit() -> None:
    admission = Admission(limit=1)
    with admission.admitted(), pytest.raises(UnavailableError, match=r"worker\.max_running") as caught:
        admission.admitted().__enter__()
    assert caught.value.retry_after_s is not None
    assert (admission.open_count, admission.refused_total) == (0, 1)


def test_a_place_is_given_back_when_the_request_fails() -> None:
    admission = Admission(limit=1)
    with pytest.raises(ZeroDivisionError), admission.admitted():
        raise ZeroDivisionError
    with admission.admitted():
        assert admission.open_count == 1


async def test_draining_refuses_new_requests_and_waits_for_the_open_ones() -> None:
    admission = Admission(limit=5)
    with admission.admitted():
        admission.drain()
        waiting = asyncio.create_task(admission.idle())
        await asyncio.sleep(0)
        assert not waiting.done()
        with pytest.raises(WorkerDrainingError):
            admission.admitted().__enter__()
    await asyncio.wait_for(waiting, timeout=5)


async def test_an_idle_worker_has_nothing_to_wait_for() -> None:
    await asyncio.wait_for(Admission(limit=1).idle(), timeout=5)


async def test_when_the_engine_stands_still_open_requests_end_with_an_error_and_new_ones_are_refused() -> None:
    admission = Admission(limit=5)

    async def request() -> None:
        with admission.admitted():
            await asyncio.Event().wait()

    waiting = [asyncio.create_task(request()) for _ in range(3)]
    await asyncio.sleep(0)
    admission.stand_still("no step for 20 s")
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in ends] == [EngineSilentError] * 3
    with pytest.raises(EngineSilentError, match="no step for 20 s"):
        admission.admitted().__enter__()
    assert admission.open_count == 0
    admission.go_on()
    with admission.admitted():
        assert admission.open_count == 1


async def test_a_request_that_its_client_cancels_while_the_engine_stands_still_is_cancelled() -> None:
    admission = Admission(limit=5)

    async def request() -> None:
        with admission.admitted():
            await asyncio.Event().wait()

    waiting = asyncio.create_task(request())
    await asyncio.sleep(0)
    waiting.cancel()
    admission.stand_still("no step for 20 s")
    with pytest.raises(asyncio.CancelledError):
        await waiting
