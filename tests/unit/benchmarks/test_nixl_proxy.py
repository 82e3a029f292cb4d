"""The proxy in front of a prefill and a decode server, both played back over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.nixl_proxy import application, decode_body, prefill_body

BODY = {"model": "m", "prompt": [1, 2], "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
BLOCKS = {"do_remote_prefill": True, "remote_block_ids": [[4]], "remote_port": 5600}


def test_the_prefill_server_is_asked_for_one_token_and_to_keep_the_blocks() -> None:
    asked = prefill_body(BODY)

    assert (asked["prompt"], asked["max_tokens"], asked["stream"]) == ([1, 2], 1, False)
    assert asked["kv_transfer_params"]["do_remote_decode"] is True
    assert "stream_options" not in asked  # refused where nothing is streamed


def test_the_decode_server_gets_the_request_unchanged_and_where_the_blocks_are() -> None:
    assert decode_body(BODY, {"kv_transfer_params": BLOCKS}) == {**BODY, "kv_transfer_params": BLOCKS}


@asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve())
        async with asyncio.timeout(10):
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True


def completions(answer: Callable[[dict[str, Any]], Response], asked: list[dict[str, Any]]) -> Starlette:
    async def complete(request: Request) -> Response:
        asked.append({**await request.json(), "id": request.headers["x-request-id"]})
        return answer(asked[-1])

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


async def _two_events() -> AsyncIterator[bytes]:
    yield b"data: one\n\n"
    yield b"data: two\n\n"


async def test_the_decode_servers_stream_comes_through_and_both_are_asked_once() -> None:
    prefill_asked: list[dict[str, Any]] = []
    decode_asked: list[dict[str, Any]] = []
    prefill = completions(lambda _: JSONResponse({"kv_transfer_params": BLOCKS}), prefill_asked)
    decode = completions(lambda _: StreamingResponse(_two_events(), media_type="text/event-stream"), decode_asked)
    async with (
        serving(prefill) as p_url,
        serving(decode) as d_url,
        serving(application(p_url, d_url, 10.0)) as url,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        answer = await http.post(url + "/v1/completions", json=BODY)
        health = await http.get(url + "/health")

    assert (answer.status_code, answer.content) == (200, b"data: one\n\ndata: two\n\n")
    assert health.status_code == 200
    assert [asked["kv_transfer_params"] for asked in decode_asked] == [BLOCKS]
    assert [asked["max_tokens"] for asked in prefill_asked] == [1]
    assert prefill_asked[0]["id"] == decode_asked[0]["id"]


@pytest.mark.parametrize("failing", ["prefill", "decode"])
async def test_what_either_server_refuses_is_refused(failing: str) -> None:
    def refuse(_: dict[str, Any]) -> Response:
        return Response("no room", 503)

    prefill = completions(refuse if failing == "prefill" else lambda _: JSONResponse({"kv_transfer_params": None}), [])
    async with (
        serving(prefill) as p_url,
        serving(completions(refuse, [])) as d_url,
        serving(application(p_url, d_url, 10.0)) as url,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        answer = await http.post(url + "/v1/completions", json=BODY)

    assert (answer.status_code, answer.text) == (503, "no room")


async def test_a_server_that_is_gone_is_a_bad_gateway() -> None:
    nowhere = "http://127.0.0.1:9"
    async with serving(application(nowhere, nowhere, 10.0)) as url, httpx.AsyncClient(trust_env=False) as http:
        answer = await http.post(url + "/v1/completions", json=BODY)

    assert answer.status_code == 502
