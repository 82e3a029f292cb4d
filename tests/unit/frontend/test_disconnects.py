"""A client that goes away takes its work with it, at once and on every path."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import grpc.aio
import pytest

from frontend import http_exchange
from frontend.face_metrics import IN_FLIGHT
from frontend.tokenizer import TextModel
from slipstream.settings import FrontendSettings
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from tests.support.scripted_dispatcher import ScriptedDispatcher, tokens
from tests.unit.frontend.conftest import Faces


@pytest.fixture
def endless(dispatcher: ScriptedDispatcher, text_model: TextModel) -> None:
    a = text_model.encode_now("a", add_special_tokens=False)
    dispatcher.script = lambda request: [tokens(*a), asyncio.Event()]


async def sent(faces: Faces, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A raw request, so that the test decides when the connection ends and nothing else does."""
    reader, writer = await asyncio.open_connection(*faces.http.removeprefix("http://").split(":"))
    content = json.dumps({"model": "tiny", "prompt": "x"} | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_before_a_whole_answer_aborts_it(faces: Faces, dispatcher: ScriptedDispatcher, n: int) -> None:
    _reader, writer = await sent(faces, n=n)
    await dispatcher.until_running(n)
    writer.close()
    await dispatcher.until_running(0)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_in_the_middle_of_a_stream_aborts_it(
    faces: Faces, dispatcher: ScriptedDispatcher, n: int
) -> None:
    reader, writer = await sent(faces, stream=True, n=n)
    async with asyncio.timeout(10):
        await reader.readuntil(b"data: ")
    await dispatcher.until_running(n)
    writer.close()
    await dispatcher.until_running(0)


async def test_leaving_in_the_middle_of_a_body_leaves_nothing(faces: Faces, dispatcher: ScriptedDispatcher) -> None:
    _reader, writer = await asyncio.open_connection(*faces.http.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert dispatcher.requests == []


@pytest.mark.usefixtures("endless")
async def test_cancelling_a_grpc_call_aborts_it(channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher) -> None:
    call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"))
    assert (await anext(aiter(call))).text == "a"
    await dispatcher.until_running(1)
    call.cancel()
    await dispatcher.until_running(0)


@pytest.mark.usefixtures("endless")
async def test_a_grpc_deadline_aborts_the_call(channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher) -> None:
    call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"), timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [response async for response in call]
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await dispatcher.until_running(0)


class TestAClientThatDoesNotRead:
    @pytest.fixture
    def frontend_settings(self) -> FrontendSettings:
        return FrontendSettings(http_port=0, grpc_port=0, request_timeout_s=0.3, drain_timeout_s=1)

    async def test_holds_its_request_no_longer_than_the_deadline_and_a_last_try(
        self,
        faces: Faces,
        dispatcher: ScriptedDispatcher,
        text_model: TextModel,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(http_exchange, "_LAST_WRITE_TIMEOUT_S", 0.2)
        a = text_model.encode_now("a" * 64, add_special_tokens=False)
        # More than fits into the buffers of two sockets.
        dispatcher.script = lambda request: [tokens(*a) for _ in range(100_000)]
        in_flight = IN_FLIGHT.labels("http", "completions")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", int(faces.http.rpartition(":")[2])))
            content = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            deaf.sendall(head.encode() + content)
            async with asyncio.timeout(10):
                while not dispatcher.requests:
                    await asyncio.sleep(0.01)
                while in_flight._value.get():
                    await asyncio.sleep(0.01)
