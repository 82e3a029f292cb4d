"""The least that a pair of vLLM servers with NixlConnector needs in front: `python -m benchmarks.nixl_proxy`.

As the proxy that vLLM's own examples carry: a prompt goes to the prefill server for one token, and with what that
server says of its blocks to the decode server, whose stream is passed through as it comes.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import msgspec
import typer
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

_COMPLETIONS = "/v1/completions"
_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

app = typer.Typer(add_completion=False)


def prefill_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the prefill server is asked: the same prompt, one token, and its blocks kept for another."""
    kept = {name: value for name, value in body.items() if name != "stream_options"}
    return {**kept, "stream": False, "max_tokens": 1, "kv_transfer_params": _REMOTE_DECODE}


def decode_body(body: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the decode server is asked: the same request, and where its blocks are."""
    return {**body, "kv_transfer_params": answer["kv_transfer_params"]}


def application(prefill_url: str, decode_url: str, timeout_s: float) -> Starlette:
    """The proxy.

    Args:
        timeout_s: longest silence of either server.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    http = httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with http:
            yield

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def complete(request: Request) -> Response:
        body = msgspec.json.decode(await request.body())
        # One id on both sides, as vLLM's example does; the servers' logs can be read together.
        headers = {"content-type": "application/json", "x-request-id": uuid.uuid4().hex}
        try:
            content = msgspec.json.encode(prefill_body(body))
            prefilled = await http.post(prefill_url + _COMPLETIONS, content=content, headers=headers)
            if prefilled.status_code != 200:
                return Response(prefilled.content, prefilled.status_code)
            content = msgspec.json.encode(decode_body(body, msgspec.json.decode(prefilled.content)))
            asked = http.build_request("POST", decode_url + _COMPLETIONS, content=content, headers=headers)
            decoding = await http.send(asked, stream=True)
        except httpx.HTTPError as error:
            return PlainTextResponse(f"a server behind the proxy failed: {error!r}", 502)
        return StreamingResponse(
            decoding.aiter_raw(),
            decoding.status_code,
            media_type=decoding.headers.get("content-type"),
            background=BackgroundTask(decoding.aclose),
        )

    routes = [Route("/health", health), Route(_COMPLETIONS, complete, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


@app.command()
def serve(
    port: Annotated[int, typer.Option("--port")],
    prefill: Annotated[str, typer.Option("--prefill", help="URL of the server that computes prompts.")],
    decode: Annotated[str, typer.Option("--decode", help="URL of the server that generates.")],
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Longest silence of either.")] = 300.0,
) -> None:
    """Run the proxy until SIGTERM."""
    uvicorn.run(
        application(prefill, decode, timeout_s), host="127.0.0.1", port=port, log_level="warning", access_log=False
    )


if __name__ == "__main__":
    app()
