"""What goes over the wire, to the byte, and the endpoints that are not OpenAI's."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from frontend import http_exchange
from frontend.tokenizer import TextModel
from slipstream.v1.sampling_pb2 import RequestAccount
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens
from tests.unit.frontend.conftest import Faces


@pytest.fixture
def two_letters(dispatcher: ScriptedDispatcher, text_model: TextModel) -> None:
    a, b = text_model.encode_now("ab", add_special_tokens=False)
    eos = min(text_model.eos_token_ids)
    dispatcher.script = lambda request: [tokens(a), tokens(b), last(eos, account=RequestAccount(prompt_tokens=1))]


def normalized(content: str) -> str:
    content = re.sub(r'"id":"([a-z]+)-[0-9a-f]{32}"', r'"id":"\1-ID"', content)
    return re.sub(r'"created":\d{10}', '"created":0', content)


@pytest.mark.usefixtures("two_letters")
async def test_a_streamed_chat_is_openais_byte_for_byte(http: httpx.AsyncClient) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = await http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    start = 'data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"tiny","choices":'
    assert normalized(response.text) == (
        start + '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        '"usage":null}\n\n'
        + start
        + '[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + start
        + '[{"index":0,"delta":{"content":"b"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + start
        + '[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n'
        + start
        + '[],"usage":{"prompt_tokens":20,"completion_tokens":3,"total_tokens":23,'
        '"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
        "data: [DONE]\n\n"
    )


@pytest.mark.usefixtures("two_letters")
async def test_a_streamed_completion_is_openais_byte_for_byte(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True})
    start = 'data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"tiny","choices":'
    assert normalized(response.text) == (
        start
        + '[{"text":"a","index":0,"logprobs":null,"finish_reason":null}]}\n\n'
        + start
        + '[{"text":"b","index":0,"logprobs":null,"finish_reason":null}]}\n\n'
        + start
        + '[{"text":"","index":0,"logprobs":null,"finish_reason":"stop"}]}\n\n'
        "data: [DONE]\n\n"
    )


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [("abc-1.2:3_4", "abc-1.2:3_4"), ("x" * 129, None), ("no spaces", None), ("", None), (None, None)],
)
async def test_a_safe_request_id_is_echoed_and_any_other_replaced(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, sent: str | None, echoed: str | None
) -> None:
    headers = {} if sent is None else {"X-Request-Id": sent}
    response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers)
    answered = response.headers["X-Request-Id"]
    assert answered == echoed if echoed else re.fullmatch("[0-9a-f]{32}", answered)
    assert dispatcher.requests[0].request_id.startswith(answered)


async def test_the_same_request_id_twice_is_two_requests_to_the_workers(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    for _ in range(2):
        await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers={"X-Request-Id": "same"})
    first, second = (request.request_id for request in dispatcher.requests)
    assert first != second


async def test_health_is_live_at_once_and_ready_with_a_decode_worker(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    assert (await http.get("/health/live")).json() == {"status": "ok"}
    assert (await http.get("/health/ready")).status_code == 200
    dispatcher.ready = False
    response = await http.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "No decode worker is ready yet."
    assert int(response.headers["retry-after"]) > 0
    assert (await http.get("/health/live")).status_code == 200


async def test_metrics_count_requests_tokens_and_latencies(http: httpx.AsyncClient) -> None:
    def value(text: str, series: str) -> float:
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    where = 'endpoint="completions",face="http",model="tiny"'
    expected_growth: dict[str, float] = {
        f'slipstream_frontend_requests_total{{code="200",{where}}}': 1,
        f'slipstream_frontend_requests_total{{code="400",{where}}}': 1,
        f"slipstream_frontend_completion_tokens_total{{{where}}}": 10,
        f"slipstream_frontend_prompt_tokens_total{{{where}}}": 2,
        f"slipstream_frontend_time_to_first_token_seconds_count{{{where}}}": 1,
        f"slipstream_frontend_request_duration_seconds_count{{{where}}}": 2,
        f"slipstream_frontend_requests_in_flight{{{where}}}": 0,
    }
    before = (await http.get("/metrics")).text
    await http.post("/v1/completions", json={"model": "tiny", "prompt": [1, 2]})
    await http.post("/v1/completions", json={"model": "tiny"})
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    growth = {series: value(response.text, series) - value(before, series) for series in expected_growth}
    tokens_said = growth[f"slipstream_frontend_completion_tokens_total{{{where}}}"]
    expected_growth[f"slipstream_frontend_completion_tokens_total{{{where}}}"] = tokens_said
    assert growth == expected_growth
    assert tokens_said > 2
    between = f"slipstream_frontend_inter_token_latency_seconds_count{{{where}}}"
    assert value(response.text, between) - value(before, between) == tokens_said - 1


async def test_the_openapi_document_describes_requests_and_answers(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatBody"}
    assert {"ChatBody", "CompletionBody", "ChatCompletion", "Completion", "ErrorBody"} <= set(schemas)
    assert schemas["ChatBody"]["properties"]["messages"]["minItems"] == 1
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(schemas)
    assert (await http.get("/docs")).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_a_413(http: httpx.AsyncClient, chunked: bool) -> None:
    content = json.dumps({"model": "tiny", "prompt": "x" * 200_000}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 10_000):
            yield content[start : start + 10_000]

    response = await http.post("/v1/completions", content=pieces() if chunked else content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert "65536" in response.json()["error"]["message"]


async def test_a_body_declared_over_the_limit_is_refused_before_it_came(
    faces: Faces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_exchange, "_REFUSED_BODY_TIMEOUT_S", 0.1)
    reader, writer = await asyncio.open_connection(*faces.http.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{")
    async with asyncio.timeout(10):
        assert b"413" in await reader.readline()
    writer.close()
