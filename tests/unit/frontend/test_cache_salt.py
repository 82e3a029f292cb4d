"""Prefix caches are kept apart by tenant and by the client's own salt, and nobody's salt fits another tenant's."""

from __future__ import annotations

import grpc.aio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.cache_salt import LONGEST_SALT, salt_of
from frontend.http_face import create_app
from frontend.inference import InferenceService
from frontend.tokenizer import TextModel
from slipstream.v1.inference_pb2 import GenerateRequest
from slipstream.v1.inference_pb2_grpc import InferenceStub
from tests.support.scripted_dispatcher import ScriptedDispatcher

TENANTS = st.from_regex(r"[A-Za-z0-9._:@-]{1,12}", fullmatch=True)
BODY = {"model": "tiny", "prompt": "hello"}


@given(TENANTS | st.just(""), TENANTS | st.just(""), st.text(max_size=12), st.text(max_size=12))
def test_salts_are_the_same_only_for_the_same_tenant_and_the_same_wish(
    tenant: str, other: str, asked: str, wished: str
) -> None:
    assert (salt_of(tenant, asked) == salt_of(other, wished)) == ((tenant, asked) == (other, wished))


def test_what_all_share_has_no_salt() -> None:
    assert salt_of("", "") == ""


async def salts(app: httpx.AsyncClient, dispatcher: ScriptedDispatcher, *tenants: str, **body: str) -> list[str]:
    for tenant in tenants:
        answer = await app.post("/v1/completions", json=BODY | body, headers={"x-slipstream-tenant": tenant})
        assert answer.status_code == 200
    return [request.cache_salt for request in dispatcher.requests]


async def test_tenants_share_a_cache_unless_told_otherwise(
    app_http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    assert await salts(app_http, dispatcher, "acme", "other") == ["", ""]


async def test_each_tenant_has_its_own_cache_where_they_are_kept_apart(
    dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    service = InferenceService(
        dispatcher, text_model, model_name="tiny", request_timeout_s=20, max_n=16, isolates_tenants=True
    )
    app = create_app(service, max_body_bytes=1 << 16)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        acme, other, again = await salts(client, dispatcher, "acme", "other", "acme")

    assert acme == again != other
    assert acme


async def test_a_client_keeps_its_prompts_apart_by_a_salt_of_its_own(
    app_http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    first, second = await salts(app_http, dispatcher, "acme", "other", cache_salt="mine")

    assert first == second == salt_of("", "mine")


@pytest.mark.parametrize("salt", ["", "s" * (LONGEST_SALT + 1), 7])
async def test_a_salt_that_is_none_is_refused(app_http: httpx.AsyncClient, salt: object) -> None:
    answer = await app_http.post("/v1/completions", json=BODY | {"cache_salt": salt})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache_salt"


async def test_the_grpc_face_takes_a_salt_too(channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher) -> None:
    stub = InferenceStub(channel)
    async for _ in stub.Generate(GenerateRequest(text="hello", cache_salt="mine"), timeout=20):
        pass
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Generate(GenerateRequest(text="hello", cache_salt="s" * (LONGEST_SALT + 1)), timeout=20).read()

    assert dispatcher.requests[0].cache_salt == salt_of("", "mine")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
