"""A client that goes away takes its work with it, at once and on every path."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc.aio
import pytest

from frontend.tokenizer import TextModel
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
