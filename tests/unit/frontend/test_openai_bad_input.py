"""Wrong requests: OpenAI's shape and status, the field named, and never a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frontend.generation import ServedModel
from frontend.openai_requests import ChatBody, CompletionBody
from tests.support.scripted_dispatcher import ScriptedDispatcher

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
HUGE = 10**400


@pytest.fixture
def http(app_http: httpx.AsyncClient) -> httpx.AsyncClient:
    return app_http


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES} | fields


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi"} | fields


async def refused(
    http: httpx.AsyncClient, path: str, body: dict[str, Any] | bytes, status: int = 400
) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(key, error)] = response.json().items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize("content", [b"", b"{", b"nonsense", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_00])
async def test_malformed_json_is_a_400(http: httpx.AsyncClient, content: bytes) -> None:
    error = await refused(http, CHAT, content)
    assert error["code"] == "invalid_json"
    assert error["param"] is None


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"text"'])
async def test_a_body_that_is_no_object_is_a_400(http: httpx.AsyncClient, content: bytes) -> None:
    await refused(http, COMPLETIONS, content)


NUMBERS: list[tuple[str, Any]] = [
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", HUGE),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", HUGE),
    ("min_p", -1),
    ("seed", 2**63),
    ("seed", True),
    ("seed", "7"),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", HUGE),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("presence_penalty", 2.5),
    ("frequency_penalty", float("-inf")),
    ("repetition_penalty", 0),
    ("n", 0),
    ("n", 17),
    ("n", HUGE),
    ("n", False),
    ("ignore_eos", 1),
    ("stream", "yes"),
    ("stop", ""),
    ("stop", 5),
    ("stop", ["x"] * 17),
    ("logit_bias", [1]),
    ("stop_token_ids", 5),
    ("user", 5),
    ("model", 5),
    ("model", ""),
    ("stream_options", True),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("field", "value"), NUMBERS, ids=lambda value: str(value)[:20])
async def test_a_wrong_value_is_a_400_that_names_its_field(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, path: str, field: str, value: Any
) -> None:
    body = chat_body() if path == CHAT else completion_body()
    error = await refused(http, path, body | {field: value})
    assert error["param"] == field
    assert dispatcher.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["x", ""]}, "stop.1"),
        ({"stop": ["x", 3]}, "stop.1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"slipstream": {"account": "yes"}}, "slipstream.account"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"messages": [*MESSAGES, {"role": "robot", "content": "hi"}]}, "messages.1.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ],
)
async def test_param_is_a_dotted_path(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert (await refused(http, CHAT, chat_body(**fields)))["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (5, "prompt"),
        (None, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        ([[]], "prompt"),
        ([1, -1], "prompt.1"),
        ([1, "a"], "prompt.1"),
        ([True], "prompt.0"),
        (["a", 1], "prompt.1"),
        ([[1], [2.5]], "prompt.1.0"),
        ([100000], "prompt"),
        ([HUGE], "prompt.0"),
        (["a"] * 257, "prompt"),
    ],
    ids=str,
)
async def test_a_wrong_prompt_is_a_400(http: httpx.AsyncClient, prompt: Any, param: str) -> None:
    assert (await refused(http, COMPLETIONS, completion_body(prompt=prompt)))["param"] == param


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"functions": [{}]}, "functions"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
        (COMPLETIONS, {"echo": True}, "echo"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
    ],
)
async def test_what_we_do_not_serve_is_refused_and_not_ignored(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    body = chat_body(**fields) if path == CHAT else completion_body(**fields)
    error = await refused(http, path, body)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_a_missing_field_is_named(http: httpx.AsyncClient, missing: str) -> None:
    body = chat_body()
    del body[missing]
    error = await refused(http, CHAT, body)
    assert (error["param"], error["code"]) == (missing, "missing_required_parameter")


async def test_a_prompt_beyond_the_context_names_both_lengths(http: httpx.AsyncClient) -> None:
    error = await refused(http, COMPLETIONS, completion_body(prompt=[1] * 300))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "maximum context length is 256 tokens" in error["message"]
    assert "300 tokens" in error["message"]


async def test_prompt_and_answer_beyond_the_context_name_all_lengths(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    message = caught.value.message
    prompt = int(message.split("(")[1].split(" in the messages")[0])
    assert f"you requested {prompt + 1000} tokens ({prompt} in the messages, 1000 in the completion)" in message
    assert "256" in message


async def test_an_unknown_model_is_a_404(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-99", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_model_of_the_cluster_that_is_not_this_frontends_is_a_404(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.served = [*dispatcher.served, ServedModel("other", 256, 1, 1)]
    assert [model.id for model in (await client.models.list()).data] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=MESSAGES)


async def test_our_model_without_a_worker_is_a_503(client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher) -> None:
    dispatcher.served = []
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (503, "no_worker")
    assert int(caught.value.response.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/models/", "/v1/chat/completions/"])
async def test_an_unknown_path_is_a_404_in_the_same_shape(http: httpx.AsyncClient, path: str) -> None:
    error = await refused(http, path, b"{}", status=405 if path == "/v1/models/" else 404)
    assert error["param"] is None


async def test_a_wrong_method_is_a_405_that_says_what_is_allowed(http: httpx.AsyncClient) -> None:
    response = await http.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(("path", "kind"), [(CHAT, ChatBody), (COMPLETIONS, CompletionBody)])
async def test_no_value_of_any_field_is_ever_a_500(http: httpx.AsyncClient, path: str, kind: type[Any]) -> None:
    """Any JSON in any field, also in places where it is nonsense."""
    bodies: list[dict[str, Any]] = []

    @settings(max_examples=150, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(kind.model_fields)), JSON_VALUES)
    def generate(field: str, value: Any) -> None:
        bodies.append((chat_body() if path == CHAT else completion_body()) | {field: value})

    generate()
    for body in bodies:
        response = await http.post(path, content=json.dumps(body).encode("utf-8", "replace"))
        assert response.status_code in (200, 400, 404), (body, response.text)
