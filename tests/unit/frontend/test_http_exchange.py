"""What an exchange over HTTP leaves behind."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from starlette.types import Message, Send

from frontend.http_exchange import ConnectedResponse
from slipstream.errors import CancelledByClientError


async def test_an_exchange_whose_client_has_left_leaves_nothing_to_the_garbage_collector() -> None:
    class Exchange:
        """What the work holds on to."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    async def respond() -> weakref.ref[Exchange]:
        held = Exchange()

        async def work(send: Send) -> None:
            assert held
            await asyncio.Event().wait()

        with pytest.raises(CancelledByClientError):
            await ConnectedResponse(work)({"type": "http"}, receive, send)
        return weakref.ref(held)

    gc.disable()
    try:
        left = await respond()
        await asyncio.sleep(0)
        assert left() is None
    finally:
        gc.enable()
