"""Both faces, really listening, in front of a scripted dispatcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import httpx
import openai
import pytest

from frontend.admission.tenants import Tenants
from frontend.http_face import create_app
from frontend.inference import InferenceService
from frontend.keys.guard import Guard
from frontend.process import bound_socket, run_faces
from frontend.tokenizer import TextModel
from slipstream.limit_settings import DEFAULT_LIMITS, LimitSettings
from slipstream.settings import FrontendSettings
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens
from tests.support.text_model_folder import write_model_folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(write_model_folder(Path(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def dispatcher(text_model: TextModel) -> ScriptedDispatcher:
    """Says "hello world" to everything, unless the test gives it another script."""
    ids = text_model.encode_now("hello world", add_special_tokens=False)
    eos = min(text_model.eos_token_ids)
    return ScriptedDispatcher(lambda request: [*(tokens(token_id) for token_id in ids), last(eos)])


@pytest.fixture
def frontend_settings() -> FrontendSettings:
    return FrontendSettings(http_port=0, grpc_port=0, max_body_bytes=64 << 10, drain_timeout_s=5)


@pytest.fixture
def limits() -> LimitSettings:
    return DEFAULT_LIMITS


@pytest.fixture
def guard() -> Guard | None:
    """Who may come in: everybody, unless the test says otherwise."""
    return None


@pytest.fixture
def tenants() -> Tenants | None:
    """Whose requests are whose: of no settings, unless the test says otherwise."""
    return None


class Faces:
    """Where the faces listen, and how to stop them."""

    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop
        self.http = ""
        self.grpc = ""
        self.task: asyncio.Task[None] | None = None


@pytest.fixture
async def faces(
    dispatcher: ScriptedDispatcher,
    text_model: TextModel,
    frontend_settings: FrontendSettings,
    limits: LimitSettings,
    guard: Guard | None,
    tenants: Tenants | None,
) -> AsyncIterator[Faces]:
    faces = Faces(asyncio.Event())
    listening = asyncio.Event()

    def note(http: str, grpc_address: str) -> None:
        faces.http, faces.grpc = f"http://{http}", grpc_address
        listening.set()

    with bound_socket(frontend_settings) as http_socket:
        faces.task = asyncio.create_task(
            run_faces(
                frontend_settings,
                dispatcher,
                text_model,
                model_name="tiny",
                http_socket=http_socket,
                stop=faces.stop,
                listening=note,
                limits=limits,
                guard=guard,
                tenants=tenants,
            )
        )
        async with asyncio.timeout(10):
            await listening.wait()
        yield faces
        faces.stop.set()
        async with asyncio.timeout(20):
            await faces.task
    assert dispatcher.running == set(), "a request was left running"


@pytest.fixture
async def client(faces: Faces) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{faces.http}/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
async def http(faces: Faces) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=faces.http, timeout=20) as client:
        yield client


@pytest.fixture
async def app_http(
    dispatcher: ScriptedDispatcher, text_model: TextModel, frontend_settings: FrontendSettings
) -> AsyncIterator[httpx.AsyncClient]:
    """The same application without a socket, for the many tests whose subject is a body."""
    service = InferenceService(dispatcher, text_model, model_name="tiny", request_timeout_s=20, max_n=16)
    app = create_app(service, max_body_bytes=frontend_settings.max_body_bytes)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app", timeout=20) as client:
        yield client


@pytest.fixture
async def channel(faces: Faces) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(faces.grpc) as channel:
        yield channel
