"""Clients: each sends one planned request over HTTP or gRPC, reads the answer in its way, and tells how it ended.

As real ones do, a client whose connection broke, or who was told to come back, tries again at the other frontend. Each
try has a request id of its own, under which it is found in the frontends' access logs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import httpx

from slipstream.client.connection import CHANNEL_OPTIONS
from slipstream.client.sampling import chat_request, text_request
from slipstream.grpc_errors import CODE_KEY, from_rpc_error
from slipstream.v1 import inference_pb2
from slipstream.v1.inference_pb2_grpc import InferenceStub
from slipstream.v1.sampling_pb2 import FinishReason
from tests.faults.chaos.answers import Entry, Expected, Pool
from tests.faults.chaos.plan import Face, Form, PlannedRequest
from tests.faults.chaos.pulse import Pulse
from tests.faults.chaos.seats import Seat
from tests.faults.chaos.settings import MODEL_NAME, REQUEST_TIMEOUT_S, key_of

HANG_S = REQUEST_TIMEOUT_S + 20.0
"""What takes longer than the frontend's own limit, and what a busy machine may add, is a hang."""
TRIES = 4
_LONGEST_PAUSE_S = 3.0
_FINISH = {FinishReason.FINISH_REASON_STOP: "stop", FinishReason.FINISH_REASON_LENGTH: "length"}


@dataclass(slots=True)
class Try:
    """One try of a request.

    Attributes:
        name: the request id that was sent.
        start: the process of the frontend that it went to, by number.
        outcome: `answered`, `left` (by its client), `cut` (the connection ended before the answer did), `hung`, or the
            code of the error that was received.
        status: of HTTP, or of gRPC's statuses the one that HTTP would have; 0 when none came.
        texts, token_ids: what came, of each of `n` answers; no token ids over HTTP.
        malformed: what was not as the protocol has it.
    """

    name: str
    frontend: Seat
    start: int
    began_s: float
    ended_s: float = 0.0
    outcome: str = ""
    status: int = 0
    message: str = ""
    retry_after_s: float | None = None
    texts: dict[int, str] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    logprob_ids: list[int] = field(default_factory=list)
    finish: dict[int, str] = field(default_factory=dict)
    completion_tokens: int | None = None
    malformed: str = ""


class Clients:
    """The connections that all clients share, to each frontend two."""

    def __init__(self, frontends: list[Seat], pool: Pool, pulse: Pulse) -> None:
        self._pulse = pulse
        self._frontends = frontends
        self._pool = pool
        self._http: dict[str, httpx.AsyncClient] = {}
        self._grpc: dict[str, grpc.aio.Channel] = {}
        self._broken: list[grpc.aio.Channel] = []

    async def close(self) -> None:
        """End all connections; the next request opens new ones."""
        http, self._http = list(self._http.values()), {}
        channels, self._grpc, self._broken = [*self._grpc.values(), *self._broken], {}, []
        await asyncio.gather(*(one.aclose() for one in http), *(one.close() for one in channels))

    async def ask(self, planned: PlannedRequest, tries: list[Try]) -> None:
        """Until it is answered, its client has left, or has tried often enough. `tries` is filled."""
        expected, entry = self._pool.expected(planned), self._pool.entry(planned.form, planned.which)
        end_s = None if planned.leaves_after_s is None else time.monotonic() + planned.leaves_after_s
        for number in range(TRIES):
            frontend = self._frontends[(planned.frontend + number) % len(self._frontends)]
            one = Try(f"c{planned.number}.{number}", frontend, frontend.starts, time.monotonic())
            tries.append(one)
            await self._try(one, planned, entry, expected, end_s)
            one.ended_s = time.monotonic()
            if one.outcome in ("answered", "left", "hung"):
                return
            pause_s = max(min(one.retry_after_s or 0.0, _LONGEST_PAUSE_S), 0.15 * 2**number)
            await asyncio.sleep(pause_s)

    async def _try(
        self, one: Try, planned: PlannedRequest, entry: Entry, expected: Expected, leaves_at_s: float | None
    ) -> None:
        asking = self._over_http if planned.face is Face.HTTP else self._over_grpc
        task = asyncio.create_task(asking(one, planned, entry, expected))
        if leaves_at_s is not None:
            await asyncio.wait({task}, timeout=max(0.0, leaves_at_s - time.monotonic()))
        else:
            await self._pulse.wait(task, HANG_S)
        if not task.done():
            one.outcome = "hung" if leaves_at_s is None else "left"
            task.cancel()
            await asyncio.wait({task}, timeout=10.0)
            return
        if (error := task.exception()) is not None:
            one.outcome, one.malformed = "malformed", f"{type(error).__name__}: {error}"

    # -- HTTP ---------------------------------------------------------------------------------------------

    async def _over_http(self, one: Try, planned: PlannedRequest, entry: Entry, expected: Expected) -> None:
        client = self._http.get(one.frontend.name)
        if client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
            client = httpx.AsyncClient(base_url=one.frontend.http_url, timeout=None, limits=limits, trust_env=False)
            self._http[one.frontend.name] = client
        path = "/v1/chat/completions" if planned.form is Form.CHAT else "/v1/completions"
        headers = {"x-request-id": one.name} | dict(_claims(planned))
        try:
            async with client.stream("POST", path, json=_body(planned, entry, expected), headers=headers) as response:
                one.status = response.status_code
                if response.status_code != 200:
                    _note_error(one, json.loads(await response.aread()), response.headers.get("retry-after"))
                elif planned.streamed:
                    await self._read_events(one, planned, response)
                else:
                    _note_whole(one, json.loads(await response.aread()))
        except (httpx.TransportError, httpx.StreamError) as error:
            one.outcome, one.message = "cut", f"{type(error).__name__}: {error}"

    async def _read_events(self, one: Try, planned: PlannedRequest, response: httpx.Response) -> None:
        async with aclosing(_events(response)) as events:
            async for data in events:
                if data == "[DONE]":
                    one.outcome = "answered"
                    continue
                if one.outcome == "answered":
                    one.malformed = "more came after [DONE]"
                event = json.loads(data)
                if "error" in event:
                    _note_error(one, event, None)
                    return
                _note_chunk(one, event)
                if planned.read_pause_s:
                    await asyncio.sleep(planned.read_pause_s)
        if not one.outcome:
            one.outcome, one.message = "cut", "the stream ended without [DONE]"

    # -- gRPC ---------------------------------------------------------------------------------------------

    async def _over_grpc(self, one: Try, planned: PlannedRequest, entry: Entry, expected: Expected) -> None:
        channel = self._grpc.get(one.frontend.name)
        if channel is None:
            options = [*CHANNEL_OPTIONS, ("grpc.max_reconnect_backoff_ms", 500), ("grpc.use_local_subchannel_pool", 1)]
            channel = self._grpc[one.frontend.name] = grpc.aio.insecure_channel(one.frontend.grpc_target, options)
        sampling: dict[str, object] = {"max_tokens": planned.max_tokens, "temperature": 0.0, "ignore_eos": True}
        if expected.stop:
            sampling["stop"] = [expected.stop]
        if planned.logprobs:
            sampling["logprobs"] = 1
        if planned.form is Form.CHAT:
            request = chat_request(entry.content, MODEL_NAME, one.name, sampling)  # type: ignore[arg-type]
        else:
            request = text_request(entry.content, MODEL_NAME, one.name, sampling)  # type: ignore[arg-type]
        call = InferenceStub(channel).Generate(request, metadata=tuple(_claims(planned)), timeout=10 * HANG_S)
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                assert isinstance(message, inference_pb2.GenerateResponse)
                one.token_ids += message.token_ids
                one.logprob_ids += [entry.chosen.token_id for entry in message.logprobs]
                one.texts[0] = one.texts.get(0, "") + message.text
                if message.finish_reason:
                    one.finish[0] = _FINISH.get(message.finish_reason, "?")
                if message.HasField("usage"):
                    one.completion_tokens = message.usage.completion_tokens
                if planned.read_pause_s:
                    await asyncio.sleep(planned.read_pause_s)
        except grpc.aio.AioRpcError as error:
            _note_status(one, error)
            if one.outcome == "cut" and self._grpc.get(one.frontend.name) is channel:
                # It would wait before it connects again; who comes next begins anew.
                self._broken.append(self._grpc.pop(one.frontend.name))
            return
        finally:
            call.cancel()
        one.outcome, one.status = "answered", 200


def _claims(planned: PlannedRequest) -> list[tuple[str, str]]:
    """Who asks, and in which class."""
    said = [("x-slipstream-class", planned.service_class)] if planned.service_class else []
    if planned.tenant is not None:
        said.append(("authorization", f"Bearer {key_of(planned.tenant)}"))
    return said


def _body(planned: PlannedRequest, entry: Entry, expected: Expected) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "max_tokens": planned.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "n": planned.n,
        "messages" if planned.form is Form.CHAT else "prompt": entry.content,
    }
    if planned.streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if expected.stop:
        body["stop"] = [expected.stop]
    return body


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _note_chunk(one: Try, event: dict[str, Any]) -> None:
    for choice in event["choices"]:
        index = choice["index"]
        if index in one.finish:
            one.malformed = f"choice {index} went on after its finish reason"
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        one.texts[index] = one.texts.get(index, "") + (text or "")
        if choice.get("finish_reason"):
            one.finish[index] = choice["finish_reason"]
    if event.get("usage"):
        one.completion_tokens = event["usage"]["completion_tokens"]


def _note_whole(one: Try, body: dict[str, Any]) -> None:
    for choice in body["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        one.texts[choice["index"]] = text or ""
        one.finish[choice["index"]] = choice["finish_reason"]
    one.completion_tokens = body["usage"]["completion_tokens"]
    one.outcome = "answered"


def _note_error(one: Try, body: dict[str, Any], retry_after: str | None) -> None:
    error = body["error"]
    one.outcome, one.message = str(error["code"]), str(error["message"])
    one.retry_after_s = float(retry_after) if retry_after is not None else None
    if not one.outcome or not one.message:
        one.malformed = f"an error without code or message: {body}"


def _note_status(one: Try, error: grpc.aio.AioRpcError) -> None:
    typed = from_rpc_error(error)
    ours = any(key == CODE_KEY for key, _ in error.trailing_metadata() or ())
    if ours:
        one.outcome, one.message, one.status = typed.code, typed.message, typed.http_status
        one.retry_after_s = typed.retry_after_s
    elif error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        one.outcome, one.message = "cut", f"{error.code().name}: {error.details()}"
    else:
        one.outcome, one.message, one.status = "untyped", f"{error.code().name}: {error.details()}", 500
