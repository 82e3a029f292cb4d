"""The gRPC face where there are keys."""

from __future__ import annotations

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from frontend.admission.claim import Priority
from frontend.keys.guard import Guard
from frontend.keys.secret import NewKey
from slipstream import config
from slipstream.cli.face_tls import api_key
from slipstream.client import AsyncClient
from slipstream.errors import InvalidApiKeyError, NotAllowedError, RateLimitError
from slipstream.grpc_errors import from_rpc_error
from slipstream.v1.inference_pb2 import GenerateRequest, ListModelsRequest
from slipstream.v1.inference_pb2_grpc import InferenceStub
from slipstream.v1.sampling_pb2 import SamplingParams
from tests.support.scripted_dispatcher import ScriptedDispatcher
from tests.unit.frontend.conftest import Faces
from tests.unit.frontend.keys import faces as keys

REQUEST = GenerateRequest(text="abc", sampling=SamplingParams(max_tokens=8))


@pytest.fixture
def guard() -> Guard:
    return keys.usual_guard()


def metadata(key: NewKey | None) -> tuple[tuple[str, str], ...]:
    return () if key is None else (("authorization", f"Bearer {key.plain}"),)


async def generate(channel: grpc.aio.Channel, key: NewKey | None) -> dict[str, str | bytes]:
    call = InferenceStub(channel).Generate(REQUEST, metadata=metadata(key), timeout=20)
    async for _ in call:
        pass
    return {str(name): value for name, value in await call.trailing_metadata() or ()}


@pytest.mark.parametrize(
    ("key", "status", "kind"),
    [
        (None, grpc.StatusCode.UNAUTHENTICATED, InvalidApiKeyError),
        (keys.STRANGER, grpc.StatusCode.UNAUTHENTICATED, InvalidApiKeyError),
        (keys.REVOKED, grpc.StatusCode.UNAUTHENTICATED, InvalidApiKeyError),
        (keys.OTHER_MODEL, grpc.StatusCode.PERMISSION_DENIED, NotAllowedError),
        (keys.OBSERVER, grpc.StatusCode.PERMISSION_DENIED, NotAllowedError),
    ],
)
async def test_who_may_not_is_told_so(
    channel: grpc.aio.Channel,
    dispatcher: ScriptedDispatcher,
    key: NewKey | None,
    status: grpc.StatusCode,
    kind: type[Exception],
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel, key)
    assert caught.value.code() is status
    assert type(from_rpc_error(caught.value)) is kind
    assert dispatcher.requests == []


async def test_a_key_lets_in_and_the_end_of_the_answer_tells_what_is_left(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    await generate(channel, keys.PLAIN)
    assert dispatcher.requests[0].claim.tenant == "acme"
    await generate(channel, keys.BATCH)
    batch = dispatcher.requests[1].claim
    assert (batch.tenant, batch.priority) == ("crawler", Priority.BATCH)
    assert (await generate(channel, keys.POOR))["x-ratelimit-remaining-requests"] == "1"
    await generate(channel, keys.POOR)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel, keys.POOR)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc_error(caught.value)
    assert isinstance(error, RateLimitError)
    assert 28 < (error.retry_after_s or 0) <= 30


async def test_models_are_those_of_the_key_and_only_health_needs_none(channel: grpc.aio.Channel) -> None:
    stub = InferenceStub(channel)
    assert not (await stub.ListModels(ListModelsRequest(), metadata=metadata(keys.OTHER_MODEL), timeout=20)).models
    assert (await stub.ListModels(ListModelsRequest(), metadata=metadata(keys.PLAIN), timeout=20)).models
    health = health_pb2_grpc.HealthStub(channel)
    assert await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
    for call in (
        stub.ListModels(ListModelsRequest(), timeout=20),
        reflect.ServerReflectionInfo(iter([asked]), timeout=20).read(),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    listed = await reflect.ServerReflectionInfo(iter([asked]), metadata=metadata(keys.PLAIN), timeout=20).read()
    assert "slipstream.v1.Inference" in {one.name for one in listed.list_services_response.service}


async def test_the_client_library_takes_a_key_and_commands_take_it_from_the_configuration(faces: Faces) -> None:
    async with AsyncClient(faces.grpc, api_key=keys.PLAIN.plain) as client:
        assert await client.models()
        assert (await client.complete("abc", max_tokens=8)).text
    async with AsyncClient(faces.grpc) as client:
        with pytest.raises(InvalidApiKeyError):
            await client.models()
    settings = config.load({}, {"SLIPSTREAM_API_KEY": keys.PLAIN.plain}, None).settings
    assert api_key(settings) == keys.PLAIN.plain
    assert keys.PLAIN.plain not in f"{settings!r}{config.dump(settings)}"
