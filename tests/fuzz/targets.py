"""What is fuzzed. A target takes any bytes and returns; only what its reader promises to raise may come out of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from pydantic import ValidationError

from engine.vllm_events import BlockRemoved, BlockStored, Event, EventBatch, Translation
from frontend.clusters.upstream import UpstreamError, _Connection
from frontend.known_caches import KnownCaches
from frontend.openai_requests import ChatBody, CompletionBody
from kv_transfer import greeting, wire
from kv_transfer.agent_start import Endpoint
from kv_transfer.board import ENDPOINT_BYTES, Board
from kv_transfer.greeting import Answer, Dialer, Knock, Listener, Proof
from kv_transfer.identity import Identity
from kv_transfer.layout import Layout, Region
from simulator.traces import read_access_log, read_azure, read_mooncake
from slipstream.errors import ConfigError, SlipstreamError, TransferError
from slipstream.v1.worker_pb2 import CacheUpdate


@dataclass(frozen=True, slots=True)
class Target:
    """One reader. `prepare` makes the function that takes the bytes."""

    name: str
    seeds: Sequence[bytes]
    prepare: Callable[[], Callable[[bytes], None]]


def _bodies() -> Callable[[bytes], None]:
    """Requests as the HTTP face reads them: the JSON, and all that is asked of a body before it is queued."""

    def read(content: bytes) -> None:
        for kind in (ChatBody, CompletionBody):
            with contextlib.suppress(ValidationError, SlipstreamError):
                body = kind.model_validate_json(content)
                body.prompts()
                body.params()

    return read


def _answers() -> Callable[[bytes], None]:
    """HTTP answers and their event streams, as a global frontend reads them, in pieces of any length."""
    loop = asyncio.new_event_loop()

    async def all_of(content: bytes) -> None:
        connection = _Connection(set())
        connection.connection_made(asyncio.Transport())
        connection.abort = lambda: None  # type: ignore[method-assign]
        connection._reset()
        step = 1 + content[0] % 64 if content else 1
        for start in range(1, len(content), step):
            connection.data_received(content[start : start + step])
        connection.connection_lost(None)
        with contextlib.suppress(UpstreamError):
            while await connection.read():
                pass

    return lambda content: loop.run_until_complete(all_of(content))


def _block_protocol() -> Callable[[bytes], None]:
    """Frames, greetings and messages of the transfer agents, and what a board says of its agent."""
    loop, identity = asyncio.new_event_loop(), Identity()
    board = Board.create(Path(tempfile.mkdtemp()), slots=2)

    async def frames(content: bytes) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(content)
        reader.feed_eof()
        while (body := await wire.read_frame(reader, wire.MAX_FRAME_BYTES)) is not None:
            with contextlib.suppress(TransferError):
                said = wire.decode(body)
                assert wire.decode(wire.encode(said)) == said

    def read(content: bytes) -> None:
        with contextlib.suppress(TransferError):
            loop.run_until_complete(frames(content))
        with contextlib.suppress(TransferError):
            wire.decode(content)
        with contextlib.suppress(TransferError):
            Listener(identity, greeting.decode(content)).answer()
        with contextlib.suppress(TransferError):
            Dialer(identity, identity.public).take_answer(greeting.decode(content))
        board.publish_endpoint(content[:ENDPOINT_BYTES])
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            msgspec.msgpack.decode(board.endpoint(), type=Endpoint)

    return read


def _events() -> Callable[[bytes], None]:
    """Cache events of vLLM, and the updates that frontends make of other workers' caches."""
    decoder = msgspec.msgpack.Decoder(EventBatch)

    def read(content: bytes) -> None:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            translation = Translation("model", 4)
            for _ in range(2):
                change = translation.change(decoder.decode(content).events)
                assert set(change.stored).isdisjoint(change.removed)
        with contextlib.suppress(Exception):  # protobuf's own error; its parser is not ours to test
            update = CacheUpdate.FromString(content)
            update.profile = b""
            _apply(update)

    return read


def _apply(update: CacheUpdate) -> None:
    caches = KnownCaches()
    for now_s in (0.0, 1.0):
        caches.apply("w", update, now_s)
    caches.blocks(list(update.stored)[:8])
    caches.lost("w")
    caches.forget("w")


def _traces() -> Callable[[bytes], None]:
    """Loads to replay: published formats and our own access log, plain or packed."""
    folder = Path(tempfile.mkdtemp())

    def read(content: bytes) -> None:
        for name, reader in (("t.jsonl", read_mooncake), ("t.csv", read_azure), ("t.xz", read_access_log)):
            file = folder / name
            file.write_bytes(content)
            with contextlib.suppress(ConfigError):
                reader(file)
        os.replace(folder / "t.xz", folder / "t.log")
        with contextlib.suppress(ConfigError):
            read_access_log(folder / "t.log")

    return read


_ID, _KEY = bytes(range(16)), bytes(range(32))
_MESSAGES: list[wire.Message] = [
    wire.Hello(2, 2**63, 0, "host", ["shm", "ucx"], Layout("f", 4, 16, [Region(1 << 47, 32, 16)])),
    wire.Link("shm/direct", b"\0card", "none"),
    wire.Open(_ID, _KEY),
    wire.Started(_ID, 4096, 2**64 - 1, _KEY),
    wire.Announce(_ID, 3, 29),
    wire.Sent(_ID, 1, (3, 2), [7, 9], (0, 4), [2**64 - 1] * 8, 1 << 40, 4096, 123),
    wire.Closed(_ID, "lease_ended", "the lease has ended"),
    wire.ProbePeer("[::1]:5000", 9, _KEY, "ucx"),
    wire.ProbeResult("shm", "direct", 1e9, 1e-5, "", ""),
    wire.Registered([_KEY]),
]
_EVENTS: list[Event] = [BlockStored([1, b"h"], None, list(range(8)), 4), BlockRemoved([1])]
_STREAM = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'

TARGETS = {
    one.name: one
    for one in (
        Target(
            "requests",
            [
                b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"stop":["a"],"seed":1}',
                b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"logprobs":true}',
                b'{"model":"m","prompt":[[1,2],[3]],"n":2,"logit_bias":{"5":1.5},"max_tokens":4}',
            ],
            _bodies,
        ),
        Target(
            "answers",
            [
                b"\x07HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                b"%x\r\n%s\r\n0\r\n\r\n" % (len(_STREAM), _STREAM),
                b"\x30HTTP/1.1 429 X\r\nretry-after: 2\r\ncontent-length: 2\r\n\r\n{}",
                b"\x01HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\nuntil the end",
            ],
            _answers,
        ),
        Target(
            "block-protocol",
            [
                *(wire.frame(wire.encode(message)) for message in _MESSAGES),
                *(wire.encode(message) for message in _MESSAGES),
                greeting.encode(Knock(greeting.VERSION, _KEY, _KEY)),
                greeting.encode(Answer(_KEY, _KEY, _KEY * 2)),
                greeting.encode(Proof(_KEY * 2)),
                msgspec.msgpack.encode(Endpoint("127.0.0.1:1", 7, ["shm"], _KEY)),
            ],
            _block_protocol,
        ),
        Target(
            "events",
            [
                msgspec.msgpack.encode(EventBatch(1.0, [*_EVENTS])),
                CacheUpdate(epoch=1, sequence=1, snapshot=True, stored=[1, 2], blocks_known=True).SerializeToString(),
                CacheUpdate(epoch=1, sequence=2, removed=[1], blocks_known=True).SerializeToString(),
            ],
            _events,
        ),
        Target(
            "traces",
            [
                b'{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n',
                b'{"timestamp": 1.5, "input_length": 6, "output_length": 5, "block_keys": [7], "tenant": "t"}\n',
                b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n",
                b"\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4F",
            ],
            _traces,
        ),
    )
}
