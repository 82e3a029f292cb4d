"""The process around the faces: light, careful with ports, and leaving in good order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

import grpc.aio
import httpx
import openai
import pytest

from frontend.face_metrics import Where
from frontend.inference import InferenceRequest, InferenceService
from frontend.process import bound_socket, run_faces, stop_signals
from frontend.prompts import TextPrompt
from frontend.tokenizer import TextModel
from slipstream.errors import StartupError, UnavailableError
from slipstream.settings import FrontendSettings
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from slipstream.v1.sampling_pb2 import SamplingParams
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens
from tests.unit.frontend.conftest import Faces

HEAVY = ("torch", "vllm", "transformers", "pandas", "scipy")


def test_the_frontend_is_light() -> None:
    program = f"import sys, frontend.process; print([name for name in {HEAVY!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize("setting", ["http_port", "grpc_port"])
async def test_a_taken_port_is_named_with_its_setting(
    dispatcher: ScriptedDispatcher, text_model: TextModel, setting: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = FrontendSettings.model_validate({"http_port": 0, "grpc_port": 0, setting: port})
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port}.*frontend\.{setting}"):
            await start_and_stop(settings, dispatcher, text_model)


async def start_and_stop(settings: FrontendSettings, dispatcher: ScriptedDispatcher, text_model: TextModel) -> None:
    stop = asyncio.Event()
    stop.set()
    with bound_socket(settings) as http_socket:
        await run_faces(settings, dispatcher, text_model, model_name="tiny", http_socket=http_socket, stop=stop)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_ask_for_the_stop(number: signal.Signals) -> None:
    with stop_signals() as stop:
        os.kill(os.getpid(), number)
        async with asyncio.timeout(10):
            await stop.wait()


async def test_open_requests_finish_before_the_process_ends(
    faces: Faces, client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    go_on = asyncio.Event()
    a, b = text_model.encode_now("ab", add_special_tokens=False)
    dispatcher.script = lambda request: [tokens(a), go_on, tokens(b), last()]
    stream = await client.completions.create(model="tiny", prompt="x", stream=True)
    assert (await anext(stream)).choices[0].text == "a"
    faces.stop.set()
    await refusing_connections(faces)
    go_on.set()
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "b"
    assert faces.task is not None
    async with asyncio.timeout(10):
        await faces.task


async def refusing_connections(faces: Faces) -> None:
    host, port = faces.http.removeprefix("http://").split(":")
    async with asyncio.timeout(10):
        while True:
            try:
                _reader, writer = await asyncio.open_connection(host, int(port))
            except ConnectionError:
                return
            writer.close()
            await asyncio.sleep(0.01)


class TestAfterTheDrainTimeout:
    @pytest.fixture
    def frontend_settings(self) -> FrontendSettings:
        return FrontendSettings(http_port=0, grpc_port=0, drain_timeout_s=0.2)

    @pytest.fixture(autouse=True)
    def _endless(self, dispatcher: ScriptedDispatcher, text_model: TextModel) -> None:
        a = text_model.encode_now("a", add_special_tokens=False)
        dispatcher.script = lambda request: [tokens(*a), asyncio.Event()]

    async def test_a_stream_gets_an_error_it_can_read(self, faces: Faces, client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        assert (await anext(stream)).choices[0].text == "a"
        faces.stop.set()
        with pytest.raises(openai.APIError, match="shutting down"):
            await anext(stream)

    async def test_a_whole_answer_becomes_a_503(
        self, faces: Faces, http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
    ) -> None:
        waiting = asyncio.create_task(http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}))
        await dispatcher.until_running(1)
        faces.stop.set()
        response = await waiting
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")

    async def test_a_grpc_call_becomes_unavailable(self, faces: Faces, channel: grpc.aio.Channel) -> None:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"))
        assert (await anext(aiter(call))).text == "a"
        faces.stop.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [response async for response in call]
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


class TestTheRequestDeadline:
    @pytest.fixture
    def frontend_settings(self) -> FrontendSettings:
        return FrontendSettings(http_port=0, grpc_port=0, request_timeout_s=0.2)

    async def test_a_request_that_takes_too_long_is_a_504(
        self, http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
    ) -> None:
        dispatcher.script = lambda request: [asyncio.Event()]
        response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert response.status_code == 504
        assert "frontend.request_timeout_s" in response.json()["error"]["message"]
        await dispatcher.until_running(0)


async def test_a_closed_service_refuses_new_requests(dispatcher: ScriptedDispatcher, text_model: TextModel) -> None:
    service = InferenceService(dispatcher, text_model, model_name="tiny", request_timeout_s=5, max_n=1)
    service.close()
    request = InferenceRequest("id", "tiny", [TextPrompt("x")], SamplingParams(), Where("http", "completions"))
    with pytest.raises(UnavailableError, match="shutting down"):
        async with service.answer(request):
            pytest.fail("an answer was begun")
    assert dispatcher.requests == []
