"""Bad input thrown at a live cluster: what is refused, what is served, and whether anything breaks.

    counts = await throw(http_url, grpc_target, model="tiny", seed=7, cases=500)

or `python -m benchmarks.bad_inputs --http URL --grpc HOST:PORT --model NAME --json`. The same seed throws the same
inputs (`benchmarks.bad_bodies`): mad values in every field of the HTTP and gRPC requests, bodies that are no JSON,
bytes on a socket that are no HTTP, messages cut in the middle, and clients that leave while they are answered. Between
them an honest request asks for the same greedy tokens again: if they do not come, the cluster crashed, or its answers
went wrong.

Counts, of which the last three must be zero:

| name          | counts                                                                                             |
|---------------|----------------------------------------------------------------------------------------------------|
| tried         | inputs thrown                                                                                      |
| refused       | answered with 4xx, its gRPC like, or a closed connection where bytes were no request               |
| served        | answered with 200, or left by the client while they were                                           |
| server_errors | answered with 5xx, INTERNAL or UNKNOWN                                                             |
| crashes       | honest requests that failed, or got other tokens than before                                       |
| stuck         | inputs without an answer in time, and requests that /metrics still counts as open after the last   |
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final
from urllib.parse import urlsplit

import grpc
import grpc.aio
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import bad_bodies
from benchmarks.command import show
from slipstream.v1 import inference_pb2

ANSWER_TIMEOUT_S: Final = 30.0
_SETTLE_TIMEOUT_S: Final = 10.0
_HONEST_EVERY: Final = 25
_OPEN = re.compile(
    rb'^slipstream_(?:frontend_requests_in_flight(?!\{endpoint="metrics")|worker_requests_open)(?:\{[^}]*\})? (\S+)$',
    re.M,
)  # not the question for /metrics itself
_GENERATE = "/slipstream.v1.Inference/Generate"
_SERVER_FAULTS = frozenset((grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS))


@dataclass(frozen=True, slots=True)
class BadInputCounts:
    """See the module."""

    seed: int
    tried: int
    refused: int
    served: int
    server_errors: int
    crashes: int
    stuck: int
    examples: tuple[str, ...] = ()

    @property
    def unharmed(self) -> bool:
        return self.tried > 0 and not (self.server_errors or self.crashes or self.stuck)


class _Thrower:
    def __init__(self, http_url: str, grpc_target: str, model: str, seed: int) -> None:
        address = urlsplit(http_url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._grpc_target, self._model = grpc_target, model
        self._chance = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []
        self._expected: object = None

    async def throw(self, cases: int) -> None:
        kinds: Sequence[Callable[[], Awaitable[None]]] = (
            *(self._mad_body,) * 5,
            *(self._mad_call,) * 3,
            *(self._broken_body, self._no_request, self._broken_message, self._leaver),
        )
        await self._honest()
        for number in range(1, cases + 1):
            self.counts["tried"] += 1
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self._chance.choice(kinds)()
            except TimeoutError:
                self._note("stuck", "no answer in time")
            except OSError as error:
                self._note("crashes", f"connection: {error}")
            if number % _HONEST_EVERY == 0:
                await self._honest()
        await self._honest()

    async def settle(self, metrics_urls: Sequence[str]) -> None:
        """Everything that is open must end by itself; /metrics counts it."""
        places = [(self._host, self._port, "/metrics")]
        for url in metrics_urls:
            parts = urlsplit(url)
            places.append((parts.hostname or "127.0.0.1", parts.port or 80, parts.path or "/metrics"))
        left = 0.0
        for _ in range(int(_SETTLE_TIMEOUT_S / 0.2)):
            pages = [await self._exchange(_get(path), (host, port)) for host, port, path in places]
            left = sum(float(found) for page in pages for found in _OPEN.findall(page))
            if not left:
                return
            await asyncio.sleep(0.2)
        self.counts["stuck"] += int(left)

    async def _honest(self) -> None:
        fields = {"model": self._model, "prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0}
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await self._exchange(_post("/v1/completions", json.dumps(fields).encode()))
            head, _, content = answer.partition(b"\r\n\r\n")
            text = json.loads(content)["choices"][0]["text"] if b" 200 " in head.partition(b"\r\n")[0] else answer
        except (OSError, TimeoutError, ValueError, LookupError) as error:
            text = repr(error)
        if self._expected is None:
            self._expected = text
        if text != self._expected or not isinstance(text, str):
            self._note("crashes", f"an honest request got {text!r:.200}")

    async def _mad_body(self) -> None:
        path, content = bad_bodies.body(self._chance, self._model)
        await self._posted(path, content)

    async def _broken_body(self) -> None:
        path, content = bad_bodies.broken_body(self._chance, self._model)
        await self._posted(path, content)

    async def _posted(self, path: str, content: bytes) -> None:
        self._count_answer(await self._exchange(_post(path, content)), content)

    async def _no_request(self) -> None:
        content = bad_bodies.head(self._chance)
        answer = await self._exchange(content, half_close=True)
        if answer:
            self._count_answer(answer, content)
        else:
            self.counts["refused"] += 1

    async def _leaver(self) -> None:
        """A stream that its client leaves, at any point."""
        fields = {"model": self._model, "prompt": "hello", "max_tokens": 200, "stream": True, "ignore_eos": True}
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            content = _post("/v1/completions", json.dumps(fields).encode())
            writer.write(content[: self._chance.choice((30, len(content) - 3, len(content), len(content)))])
            await writer.drain()
            if self._chance.random() < 0.5:
                async with asyncio.timeout(0.05):
                    await reader.read(1)
        except TimeoutError:
            pass  # it leaves without having seen anything
        finally:
            writer.transport.abort()
        self.counts["served"] += 1

    async def _mad_call(self) -> None:
        await self._called(bad_bodies.call(self._chance, self._model).SerializeToString())

    async def _broken_message(self) -> None:
        await self._called(bad_bodies.wire(self._chance, self._model))

    async def _called(self, content: bytes) -> None:
        async with grpc.aio.insecure_channel(self._grpc_target) as channel:
            method: grpc.aio.UnaryStreamMultiCallable[bytes, inference_pb2.GenerateResponse] = channel.unary_stream(
                _GENERATE, response_deserializer=inference_pb2.GenerateResponse.FromString
            )
            status: grpc.StatusCode = grpc.StatusCode.OK
            try:
                async for _ in method(content, timeout=ANSWER_TIMEOUT_S):
                    pass
            except grpc.aio.AioRpcError as error:
                status = error.code()
                if status == grpc.StatusCode.UNAVAILABLE:
                    raise ConnectionError(error.details()) from error
                if status in _SERVER_FAULTS:
                    self._note("server_errors", f"{status.name} {error.details()} to {content!r:.300}")
                    return
        self.counts["served" if status == grpc.StatusCode.OK else "refused"] += 1

    async def _exchange(
        self, content: bytes, place: tuple[str, int] | None = None, *, half_close: bool = False
    ) -> bytes:
        """All that comes until the server closes; nothing when it only resets."""
        reader, writer = await asyncio.open_connection(*(place or (self._host, self._port)), limit=1 << 24)
        try:
            writer.write(content)
            if half_close and writer.can_write_eof():
                writer.write_eof()
            return await reader.read(-1)
        except ConnectionResetError:
            return b""
        finally:
            writer.transport.abort()

    def _count_answer(self, answer: bytes, thrown: bytes) -> None:
        status = answer[9:12]
        if status[:1] == b"2" and b'"error"' not in answer:
            self.counts["served"] += 1
        elif status[:1] in (b"2", b"3", b"4"):
            self.counts["refused"] += 1
        elif not answer:
            self._note("server_errors", f"closed without an answer: {thrown!r:.300}")
        else:
            self._note("server_errors", f"{answer!r:.200} to {thrown!r:.300}")

    def _note(self, what: str, example: str) -> None:
        self.counts[what] += 1
        if len(self.examples) < 10:
            self.examples.append(f"{what}: {example}")


async def throw(
    http_url: str, grpc_target: str, *, model: str, seed: int, cases: int, metrics_urls: Sequence[str] = ()
) -> BadInputCounts:
    """Throw `cases` inputs, one after the other, and count what became of them.

    Args:
        metrics_urls: /metrics of the workers, where open requests are counted too; the frontend's is known.
    """
    thrower = _Thrower(http_url, grpc_target, model, seed)
    await thrower.throw(cases)
    await thrower.settle(metrics_urls)
    names = ("tried", "refused", "served", "server_errors", "crashes", "stuck")
    tried, refused, served, server_errors, crashes, stuck = (thrower.counts[name] for name in names)
    return BadInputCounts(seed, tried, refused, served, server_errors, crashes, stuck, tuple(thrower.examples))


def _post(path: str, content: bytes) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(content)}", "", "")).encode() + content


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode()


def _print(console: Console, counts: BadInputCounts) -> None:
    table = Table(title=f"Bad inputs, seed {counts.seed}", title_justify="left")
    names = ("tried", "refused", "served", "server_errors", "crashes", "stuck")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(str(getattr(counts, name)) for name in names))
    console.print(table)
    for example in counts.examples:
        console.print(example, markup=False)


def main(
    http: Annotated[str, typer.Option(help="URL of the HTTP face")] = "http://127.0.0.1:8000",
    grpc_target: Annotated[str, typer.Option("--grpc", help="host:port of the gRPC face")] = "127.0.0.1:8001",
    model: Annotated[str, typer.Option(help="the model's name")] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option(help="of the inputs")] = 7,
    cases: Annotated[int, typer.Option(min=1, help="inputs thrown")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="the counts as JSON")] = False,
) -> None:
    """Throw bad input at a running cluster and count what breaks."""
    counts = asyncio.run(throw(http, grpc_target, model=model, seed=seed, cases=cases))
    show(counts, as_json, _print)
    raise typer.Exit(0 if counts.unharmed else 1)


if __name__ == "__main__":
    typer.run(main)
