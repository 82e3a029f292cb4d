"""A client that goes away takes its work with it, at once and on every path."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc.aio
import pytest

from frontend import http_exchange
from frontend.http_face import create_app
from frontend.inference import InferenceService
from frontend.tokenizer import TextModel
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens
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


async def test_a_client_that_does_not_read_holds_its_request_until_the_deadline_and_one_last_try(
    dispatcher: ScriptedDispatcher, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_exchange, "_LAST_WRITE_TIMEOUT_S", 0.1)
    a = text_model.encode_now("a", add_special_tokens=False)
    dispatcher.script = lambda request: [tokens(*a), last()]
    service = InferenceService(dispatcher, text_model, model_name="tiny", request_timeout_s=0.1, max_n=1)
    app = create_app(service, max_body_bytes=1000)
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    tried: list[str] = []

    async def receive() -> Any:
        return incoming.pop() if incoming else await asyncio.Event().wait()

    async def deaf(message: Any) -> None:
        """As the server's `send` while the buffers of the connection are full."""
        tried.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    async with asyncio.timeout(10):
        await app(scope, receive, deaf)
    assert tried == ["http.response.start", "http.response.body", "http.response.body"]
    await dispatcher.until_running(0)
