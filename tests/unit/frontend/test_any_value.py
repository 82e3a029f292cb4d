"""Any value in any field, over HTTP and gRPC: an answer, or a 4xx of ours that names a field; and nothing stays open.

The fields are read from the models, and each must have values of its own here that are valid, at its limits and beyond
them: a new field without them fails the first test.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc.aio
import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from frontend.http_face import create_app
from frontend.inference import InferenceService
from frontend.openai_requests import ChatBody, CompletionBody
from frontend.tokenizer import TextModel
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from slipstream.v1.sampling_pb2 import SamplingParams
from tests.support.scripted_dispatcher import ScriptedDispatcher

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KINDS: dict[str, Any] = {CHAT: ChatBody, COMPLETIONS: CompletionBody}
ERROR_FIELDS = {"message", "type", "param", "code"}

EDGES = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400)
integers = st.sampled_from(EDGES) | st.integers()
numbers = integers | st.floats() | st.sampled_from((1e-320, 5e-324, 1e308, -0.0, float("nan"), float("inf")))
HOSTILE_TEXTS = (
    "\0",
    "\ud800",
    "{{ 7*7 }}",
    "{% for",
    "<|im_start|>",
    "</s>",
    "\u202e",
    "🙂" * 300,
    "x" * 1025,
    "\r\nX: 1",
)
texts = st.text(max_size=12) | st.sampled_from(HOSTILE_TEXTS)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
ids = st.integers(0, 300) | integers
parts = st.fixed_dictionaries({"type": st.just("text") | texts}, optional={"text": texts, "image_url": anything})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(("system", "user", "assistant", "developer", "tool", "root")) | texts},
    optional={
        "content": texts | st.lists(parts | anything, max_size=3) | anything,
        "name": texts | anything,
        "tool_calls": anything,
        "function_call": anything,
    },
)
number, whole, text, flag = numbers, integers, texts, st.booleans()
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": whole | st.integers(1, 20),
    "min_tokens": whole | st.integers(0, 20),
    "temperature": number | st.floats(0, 2),
    "top_p": number | st.floats(0, 1),
    "top_k": whole | st.integers(-1, 50),
    "min_p": number | st.floats(0, 1),
    "seed": whole,
    "presence_penalty": number | st.floats(-2, 2),
    "frequency_penalty": number | st.floats(-2, 2),
    "repetition_penalty": number | st.floats(0, 2),
    "ignore_eos": flag,
    "logit_bias": st.dictionaries(ids.map(str) | texts, numbers, max_size=4)
    | st.just({str(i): 1 for i in range(1025)}),
    "stop_token_ids": st.lists(ids, max_size=4) | st.just([1] * 1025),
    "stop": texts | st.lists(texts, max_size=17),
    "logprobs": flag | st.integers(-1, 21) | whole,
}
SHARED: dict[str, st.SearchStrategy[Any]] = SAMPLING | {
    "model": st.just("tiny") | texts,
    "n": st.integers(-1, 17) | whole,
    "stream": flag,
    "stream_options": st.fixed_dictionaries({"include_usage": flag | anything}) | anything,
    "user": texts | st.just("u" * 10_000),
    "service_tier": st.sampled_from(("flex", "priority", "auto")) | texts,
    "slipstream": st.fixed_dictionaries({"account": flag | anything}) | anything,
    "cache_salt": texts,
}
TOOLS = st.just([{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]) | anything
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    CHAT: SHARED
    | {
        "messages": st.lists(messages | anything, max_size=4) | st.just([{}] * 9000),
        "max_completion_tokens": whole,
        "top_logprobs": st.integers(-1, 21) | whole,
        "add_generation_prompt": flag,
        "continue_final_message": flag,
        "tools": TOOLS,
        "tool_choice": st.sampled_from(("none", "auto", "required")) | anything,
        "functions": TOOLS,
        "function_call": anything,
        "response_format": st.fixed_dictionaries({"type": st.sampled_from(("text", "json_object", "json_schema"))}),
        "modalities": st.just(["text"]) | anything,
        "audio": anything,
        "web_search_options": anything,
    },
    COMPLETIONS: SHARED
    | {
        "prompt": texts | st.lists(ids, max_size=5) | st.lists(texts, max_size=3) | st.lists(st.lists(ids, max_size=3)),
        "echo": flag,
        "best_of": whole,
        "suffix": texts,
    },
}
many = settings(max_examples=120, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("path", KINDS)
def test_every_field_has_values_here(path: str) -> None:
    assert set(FIELDS[path]) == set(KINDS[path].model_fields)


def test_every_field_of_a_call_has_values_here() -> None:
    assert set(SAMPLING) == {field.name for field in SamplingParams.DESCRIPTOR.fields}


@pytest.fixture
async def app_http(
    dispatcher: ScriptedDispatcher, text_model: TextModel
) -> AsyncIterator[tuple[httpx.AsyncClient, InferenceService]]:
    service = InferenceService(dispatcher, text_model, model_name="tiny", request_timeout_s=20, max_n=16)
    app = create_app(service, max_body_bytes=1 << 20)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app", timeout=20) as client:
        yield client, service


def _in_flight() -> float:
    return sum(
        sample.value
        for family in REGISTRY.collect()
        if family.name == "slipstream_frontend_requests_in_flight"
        for sample in family.samples
    )


@pytest.mark.parametrize("path", KINDS)
async def test_any_value_of_any_field_is_answered_or_refused_by_name(
    app_http: tuple[httpx.AsyncClient, InferenceService], dispatcher: ScriptedDispatcher, path: str
) -> None:
    http, service = app_http
    document = (await http.get("/openapi.json")).json()
    success = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    valid = jsonschema.Draft202012Validator(success | {"components": document["components"]})
    bodies: list[dict[str, Any]] = []
    base = {"model": "tiny"} | (
        {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    )
    fields = FIELDS[path]

    @many
    @given(st.data())
    def generate(data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
        bodies.append(
            base | {name: data.draw(fields[name] | anything if len(names) == 1 else fields[name]) for name in names}
        )

    generate()
    bodies += [base | {name: None} for name in fields]  # each at least once, alone
    seen = set()
    for body in bodies:
        response = await http.post(path, content=json.dumps(body).encode("utf-8", "surrogatepass"))
        seen.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code == 200:
            if not body.get("stream"):
                valid.validate(response.json())
        else:
            _check_error(response.json(), body)
    assert seen >= {200, 400}
    assert dispatcher.running == set()
    assert not service._open
    assert _in_flight() == 0


def _check_error(answered: dict[str, Any], body: dict[str, Any]) -> None:
    error = answered["error"]
    assert set(error) == ERROR_FIELDS
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 2000
    if error["code"] != "invalid_json":
        assert error["param"].split(".")[0] in {*body, "model", "messages", "prompt"}, (error, body)


async def test_any_value_of_any_field_of_a_call_is_answered_or_refused_by_name(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    requests: list[inference_pb2.GenerateRequest] = []

    @many
    @given(st.data())
    def generate(data: st.DataObject) -> None:
        request = inference_pb2.GenerateRequest(text="hi")
        for name in data.draw(st.lists(st.sampled_from(sorted(SAMPLING)), min_size=1, max_size=3, unique=True)):
            _put(request.sampling, name, data.draw(SAMPLING[name]))
        clean = texts.map(lambda said: said.encode("utf-8", "replace").decode())
        match data.draw(st.integers(0, 5)):
            case 0:
                request.token_ids.ids.extend(data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=5)))
            case 1:
                for _ in range(data.draw(st.integers(0, 3))):
                    request.chat.messages.add(role=data.draw(clean), content=data.draw(clean))
            case 2:
                request.model, request.request_id, request.text = (data.draw(clean) for _ in range(3))
            case 3:
                request.ClearField("input")
        requests.append(request)

    generate()
    seen = set()
    for request in requests:
        call = stub.Generate(request, timeout=20)
        with suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        status = await call.code()
        seen.add(status)
        if status != grpc.StatusCode.OK:
            told = {str(name) for name, _ in await call.trailing_metadata() or ()}
            assert status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), (request, call)
            assert told >= {"slipstream-code", "slipstream-param"}, (request, call)
    assert seen >= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    await dispatcher.until_running(0)
    assert _in_flight() == 0


def _put(params: SamplingParams, name: str, value: Any) -> None:
    """As far as the message can hold it at all."""
    try:
        if name == "logit_bias":
            for token_id, bias in value.items():
                params.logit_bias[int(token_id)] = bias
        elif name == "stop_token_ids":
            params.stop_token_ids.extend(value)
        elif name == "stop":
            said = [value] if isinstance(value, str) else value
            params.stop.extend(one.encode("utf-8", "replace").decode() for one in said)
        else:
            setattr(params, name, value)
    except (ValueError, TypeError, OverflowError):
        return  # protobuf has no such value


MILLIONS = {
    "prompt": b"[1" + b',"a"' * 1_000_000 + b"]",
    "messages": b"[1" + b",1" * 1_000_000 + b"]",
    "modalities": b"[1" + b",1" * 1_000_000 + b"]",
    "logit_bias": b"{" + b",".join(b'"x%d":"a"' % place for place in range(200_000)) + b"}",
    "stop": b"[1" + b",1" * 1_000_000 + b"]",
}


@pytest.mark.parametrize("field", MILLIONS)
def test_of_a_million_mistakes_one_is_looked_for(field: str) -> None:
    """All of them took 15 s of the event loop and 3 GB, for one body of eight megabytes."""
    from pydantic import ValidationError

    kind = CompletionBody if field == "prompt" else ChatBody
    start = b'{"model":"m"' if field in ("prompt", "messages") else b'{"model":"m","messages":[{"role":"user"}]'
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(start + b',"%s":%s}' % (field.encode(), MILLIONS[field]))
    assert caught.value.error_count() < 10
