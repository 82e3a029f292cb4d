"""Frames on the control connection: what is said arrives, and what nobody said is refused with a type."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import wire
from kv_transfer.layout import Layout, Region
from slipstream.errors import TransferError

ID, MAC = bytes(range(16)), bytes(range(32))
MESSAGES: list[wire.Message] = [
    wire.Hello(wire.VERSION, 2**64 - 1, 0, "host", ["shm", "ucx"], Layout("f", 4, 16, [Region(1 << 47, 32, 16)])),
    wire.Hello(wire.VERSION, 1, 2, "", [], None),
    wire.Link("shm/direct", b"\0card", "none"),
    wire.Linked(b"", "why not"),
    wire.Open(ID, MAC),
    wire.Started(ID, 4096, 2**64 - 1, MAC),
    wire.Announce(ID, 3, 29),
    wire.Sent(ID, 1, (3, 2), [7, 9], (0, 4), [2**64 - 1] * 8, 1 << 40, 4096, 123),
    wire.Computed(ID),
    wire.Credit(ID, 1 << 62),
    wire.Again(ID, 7),
    wire.Done(ID),
    wire.Closed(ID, "lease_ended", "the lease has ended"),
    wire.Ping(),
    wire.ProbeAsk(0, 0),
    wire.ProbeSent(5, 1 << 47, 8 << 20),
    wire.ProbePeer("[::1]:5000", 9, MAC, "ucx"),
    wire.ProbeResult("shm", "direct", 1e9, 1e-5, "", ""),
    wire.Registered([MAC, bytes(32)]),
    wire.Noted(),
]


async def heard(raw: bytes) -> list[wire.Message]:
    """All messages in these bytes, until the connection's end."""
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    messages = []
    while (body := await wire.read_frame(reader, wire.MAX_FRAME_BYTES)) is not None:
        messages.append(wire.decode(body))
    return messages


def test_every_kind_of_message_is_covered_here() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.Message.__args__)


async def test_messages_arrive_as_they_were_said_and_in_order() -> None:
    assert await heard(b"".join(wire.frame(wire.encode(message)) for message in MESSAGES)) == MESSAGES


async def test_a_connection_that_ends_inside_a_frame_has_ended() -> None:
    raw = wire.frame(wire.encode(MESSAGES[0]))
    for length in (0, 1, 4, len(raw) - 1):
        assert await heard(raw[:length]) == []


async def test_a_frame_is_not_waited_for_when_it_says_that_it_is_huge() -> None:
    with pytest.raises(TransferError, match="4294967295 bytes") as caught:
        await heard(struct.pack(">I", 2**32 - 1))
    assert caught.value.code == "bad_message"


def refused_or_read(body: bytes) -> None:
    with contextlib.suppress(TransferError):  # nothing else comes out
        asyncio.run(heard(struct.pack(">I", len(body)) + body))


@given(st.binary(max_size=100))
def test_bytes_that_are_no_message_are_refused_with_a_type(body: bytes) -> None:
    refused_or_read(body)


@given(st.sampled_from(MESSAGES), st.data())
def test_a_message_with_a_changed_byte_is_another_one_or_refused(message: wire.Message, data: st.DataObject) -> None:
    body = bytearray(wire.encode(message))
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    refused_or_read(bytes(body))


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode({"type": "open"}),
        msgspec.msgpack.encode({"type": "open", "handoff": 5}),
        msgspec.msgpack.encode({"type": "gossip"}),
        msgspec.msgpack.encode({"type": "closed", "handoff": ID, "code": "xx", "message": ""}).replace(
            b"xx", b"\xff\xfe"
        ),
        b"\x91" * 10_000,
    ],
    ids=["a field is missing", "a field of another type", "an unknown kind", "not UTF-8", "deeply nested"],
)
def test_what_is_nearly_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(TransferError) as caught:
        asyncio.run(heard(struct.pack(">I", len(body)) + body))
    assert caught.value.code == "bad_message"
