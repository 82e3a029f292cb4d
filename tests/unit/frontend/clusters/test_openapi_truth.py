"""A global frontend keeps its clusters' OpenAPI document: schemathesis asks it by that, before a real HTTP face."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis import GenerationMode

from frontend.http_face import create_app
from frontend.inference import InferenceService
from frontend.tokenizer import TextModel
from tests.support.scripted_dispatcher import ScriptedDispatcher
from tests.support.scripted_peer import ScriptedPeer
from tests.unit.frontend.clusters.test_http_face import global_frontend
from tests.unit.frontend.test_openapi_truth import OURS, answers

BOTH = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model_id}",
    "/health/live",
    "/health/ready",
)
_OF_THE_CONNECTION = ("content-length", "transfer-encoding", "host", "connection", "x-slipstream-peer-key")
_WAIT_S = 30.0


def a_cluster(face: httpx.AsyncClient) -> ScriptedPeer:
    """One whose requests a real HTTP face answers."""

    async def script(writer: asyncio.StreamWriter) -> None:
        seen = peer.seen[-1]
        headers = {name: value for name, value in seen.headers.items() if name.lower() not in _OF_THE_CONNECTION}
        answer = await face.post(seen.path, content=seen.body, headers=headers)
        lines = [f"HTTP/1.1 {answer.status_code} X", f"content-length: {len(answer.content)}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items() if name not in _OF_THE_CONNECTION]
        writer.write("\r\n".join([*lines, "", ""]).encode() + answer.content)

    peer = ScriptedPeer(script, model=OURS)
    return peer


# What is asked is drawn in a thread, beside the global frontend's own: the frontend's random numbers are none of it.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
async def test_what_the_document_says_is_what_a_global_frontend_answers(
    text_model: TextModel, dispatcher: ScriptedDispatcher
) -> None:
    service = InferenceService(dispatcher, text_model, model_name=OURS, request_timeout_s=20, max_n=3)
    app, loop = create_app(service, max_body_bytes=1 << 20), asyncio.get_running_loop()

    async def answered(client: httpx.AsyncClient, sent: dict[str, Any]) -> httpx.Response:
        content = sent.get("data") or (json.dumps(sent["json"]).encode() if "json" in sent else None)
        return await client.request(
            sent["method"], sent["url"], params=sent.get("params"), headers=dict(sent["headers"]), content=content
        )

    def ask_all(client: httpx.AsyncClient) -> dict[str, Counter[int]]:
        def call(case: Any) -> httpx.Response:
            sent = case.as_transport_kwargs(base_url="http://global")
            return asyncio.run_coroutine_threadsafe(answered(client, sent), loop).result(_WAIT_S)

        seen = {}
        found: Any
        for found in schemathesis.openapi.from_dict(app.openapi()).get_all_operations():
            operation = found.ok()
            if operation.path in BOTH:
                seen[operation.label] = answers(operation, GenerationMode.POSITIVE, call)
                if operation.body:
                    refused = answers(operation, GenerationMode.NEGATIVE, call)
                    assert set(refused) <= {400, 404}, (operation.label, refused)
        return seen

    face = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cluster", timeout=_WAIT_S)
    async with face, global_frontend(peer := a_cluster(face), max_body_bytes=1 << 20) as (client, _):
        seen = await asyncio.to_thread(ask_all, client)
    assert len(seen) == len(BOTH)
    assert peer.seen, "something was passed on"
    assert set(seen["GET /v1/models"]) == set(seen["GET /health/live"]) == {200}
    assert seen["POST /v1/completions"][200] > 0
    assert all(status in (200, 400, 404) for statuses in seen.values() for status in statuses)
