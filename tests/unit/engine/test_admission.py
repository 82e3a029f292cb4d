"""How many requests a worker takes, and how it stops taking any."""

import asyncio

import pytest

from engine.admission import Admission
from slipstream.errors import UnavailableError, WorkerDrainingError


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
