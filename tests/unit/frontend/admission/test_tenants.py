"""Whose request it is and how urgent: from keys, headers and the body, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path

import grpc.aio
import httpx
import pytest

from frontend.admission.claim import DEFAULT_CLAIM, Claim, Priority
from frontend.admission.metrics import MAX_TENANT_LABELS, TenantLabels
from frontend.admission.tenants import Tenants
from slipstream import config, config_file
from slipstream.errors import ConfigError, DeadlineError, InvalidRequestError, QueueFullError, SlipstreamError
from slipstream.grpc_errors import from_rpc_error
from slipstream.settings import AdmissionSettings, TenantSettings
from slipstream.v1.inference_pb2 import GenerateRequest
from slipstream.v1.inference_pb2_grpc import InferenceStub
from tests.support.scripted_dispatcher import ScriptedDispatcher


def tenant(name: str, **fields: object) -> TenantSettings:
    return TenantSettings(name=name, key_sha256=sha256(f"key-{name}".encode()).hexdigest(), **fields)


OPEN = Tenants(AdmissionSettings())
KEYED = Tenants(AdmissionSettings(tenants=(tenant("acme", weight=3.0), tenant("crawler", priority="batch"))))


def claim(tenants: Tenants, tier: str | None = None, **headers: str) -> Claim:
    return tenants.of_http([(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()], tier)


def test_a_request_that_says_nothing_is_the_default_tenants_and_realtime() -> None:
    assert claim(OPEN, host="here", authorization="Bearer any") == DEFAULT_CLAIM


def test_headers_name_class_tenant_and_time_where_no_keys_are_configured() -> None:
    said = claim(OPEN, x_slipstream_class="Batch", x_slipstream_tenant="acme", x_request_timeout_s="2.5")
    assert said == Claim(Priority.BATCH, "acme", 1.0, 2.5)


def test_a_key_names_its_tenant_with_weight_and_class() -> None:
    assert claim(KEYED, authorization="Bearer key-acme") == Claim(Priority.REALTIME, "acme", 3.0)
    assert claim(KEYED, authorization="bearer key-crawler") == Claim(Priority.BATCH, "crawler")


@pytest.mark.parametrize("authorization", ["Bearer unknown", "Basic key-acme", "key-acme", "Bearer "])
def test_an_unknown_key_is_the_default_tenants(authorization: str) -> None:
    assert claim(KEYED, authorization=authorization) == DEFAULT_CLAIM


def test_with_keys_a_header_names_no_tenant_and_lifts_no_class() -> None:
    said = claim(KEYED, authorization="Bearer key-crawler", x_slipstream_tenant="acme", x_slipstream_class="realtime")
    assert said == Claim(Priority.BATCH, "crawler")
    assert claim(KEYED, authorization="Bearer key-acme", x_slipstream_class="nearline").priority is Priority.NEARLINE


@pytest.mark.parametrize(
    ("tier", "priority"),
    [("flex", Priority.BATCH), ("priority", Priority.REALTIME), ("auto", Priority.NEARLINE), (None, Priority.NEARLINE)],
)
def test_openais_service_tier_is_understood(tier: str | None, priority: Priority) -> None:
    assert claim(Tenants(AdmissionSettings(default_class="nearline")), tier).priority is priority


def test_the_header_goes_before_the_service_tier() -> None:
    assert claim(OPEN, "flex", x_slipstream_class="nearline").priority is Priority.NEARLINE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-slipstream-class", "urgent"),
        ("x-slipstream-tenant", "a b"),
        ("x-slipstream-tenant", "x" * 65),
        ("x-request-timeout-s", "soon"),
        ("x-request-timeout-s", "0"),
        ("x-request-timeout-s", "inf"),
    ],
)
def test_a_wrong_value_is_the_clients_mistake_and_named(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        OPEN.of_http([(name.encode(), value.encode())])
    assert caught.value.param == name


def test_a_calls_own_deadline_counts_like_the_header() -> None:
    assert OPEN.of_grpc((), 3.0).timeout_s == 3.0
    assert OPEN.of_grpc((("x-request-timeout-s", "2"),), 3.0).timeout_s == 2.0
    assert OPEN.of_grpc((("x-request-timeout-s", "4"),), 3.0).timeout_s == 3.0
    assert OPEN.of_grpc((), None) == DEFAULT_CLAIM


def test_tenants_that_are_made_up_share_one_label() -> None:
    labels = TenantLabels(["acme"])
    made_up = {labels.of(Claim(tenant=f"t{number}")) for number in range(1000)}
    assert len(made_up) == MAX_TENANT_LABELS + 1
    assert labels.of(Claim(tenant="acme")) == "acme"


def test_tenants_are_read_from_the_file_and_written_again(tmp_path: Path) -> None:
    given, written = tmp_path / "given.yaml", tmp_path / "written.yaml"
    key = sha256(b"key-acme").hexdigest()
    given.write_text(
        f"admission:\n  default_class: nearline\n  tenants:\n  - name: acme\n    key_sha256: {key}\n    weight: 3\n"
    )
    loaded = config.load({}, {}, given).settings
    assert loaded.admission.tenants == (tenant("acme", weight=3.0),)
    config_file.write(loaded, written)
    assert config.load({}, {}, written).settings == loaded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: a b", "admission.tenants"),
        ("- {name: a, key_sha256: secret}", "admission.tenants"),
        ("- &one {name: a}\n  - *one", "has an alias"),
    ],
)
def test_a_wrong_tenant_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(f"admission:\n  tenants:\n  {text}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        config.load({}, {}, file)
    assert f"{file}:" in str(caught.value)


BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 4}


async def test_http_hands_on_what_was_claimed(http: httpx.AsyncClient, dispatcher: ScriptedDispatcher) -> None:
    headers = {"X-Slipstream-Class": "nearline", "X-Slipstream-Tenant": "acme", "X-Request-Timeout-S": "9"}
    assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
    assert (await http.post("/v1/completions", json=BODY | {"service_tier": "flex"})).status_code == 200
    claims = [request.claim for request in dispatcher.requests]
    assert claims == [Claim(Priority.NEARLINE, "acme", 1.0, 9.0), Claim(Priority.BATCH)]


async def test_http_answers_overload_with_429_and_retry_after_and_a_wrong_header_with_400(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [QueueFullError("the queue is full", retry_after_s=6.2)]
    for body in (BODY, BODY | {"stream": True}):
        refused = await http.post("/v1/completions", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
        assert refused.json()["error"]["code"] == "queue_overflow"
        assert refused.json()["error"]["type"] == "rate_limit_error"
    wrong = await http.post("/v1/completions", json=BODY, headers={"x-slipstream-class": "urgent"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-slipstream-class")


async def grpc_refusal(channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> SlipstreamError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in InferenceStub(channel).Generate(GenerateRequest(text="abc"), metadata=metadata, timeout=20):
            pass
    error = from_rpc_error(caught.value)
    assert error.grpc_status is caught.value.code()
    return error


async def test_grpc_answers_overload_with_resource_exhausted_and_when_to_come_back(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [QueueFullError("the queue is full", retry_after_s=6.2)]
    error = await grpc_refusal(channel, ("x-slipstream-class", "batch"), ("x-slipstream-tenant", "acme"))
    assert isinstance(error, QueueFullError)
    assert error.retry_after_s == 6.2
    assert dispatcher.requests[0].claim.priority is Priority.BATCH
    assert dispatcher.requests[0].claim.tenant == "acme"
    wrong = await grpc_refusal(channel, ("x-request-timeout-s", "-1"))
    assert (wrong.code, wrong.param) == ("invalid_value", "x-request-timeout-s")


async def test_the_time_a_client_gives_ends_its_request(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    never = asyncio.Event()
    dispatcher.script = lambda request: [never]
    late = await http.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": "0.2"})
    assert late.status_code == 504
    assert "0.2 s allowed (x-request-timeout-s)" in late.json()["error"]["message"]
    assert isinstance(await grpc_refusal(channel, ("x-request-timeout-s", "0.2")), DeadlineError)
