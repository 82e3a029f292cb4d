"""What two transfer agents say to each other over their control connection, once they know each other (`greeting`).

The worker that receives blocks opens the connection to the one that sends them. A frame is its length (4 bytes, big
endian) and one msgpack message, with the session's tag in front. Block bytes never travel here; they go over a
transport's link.

    receiver -> sender   Hello, Link, Open, Announce, Credit, Again, Done, Closed, Ping, ProbeAsk
    sender -> receiver   Hello, Linked, Started, Sent, Computed, Closed, Ping, ProbeSent
    a worker's service -> its own agent: ProbePeer, answered by ProbeResult; Registered, answered by Noted

A number or a length that cannot be meant is refused when the message is read.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Annotated

import msgspec
from msgspec import Meta

from kv_transfer.layout import Layout
from slipstream.errors import TransferError

VERSION = 2
MAX_FRAME_BYTES = 1 << 20
"""A span of 8 MiB in pieces of 1 KiB takes some 150 KB; a cluster of 4096 workers, some 140 KB."""
_LENGTH = struct.Struct(">I")

HandoffId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Mac = Annotated[bytes, Meta(min_length=32, max_length=32)]
Number = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message in both directions.

    Attributes:
        epoch: of the speaker's process; a restarted one has another.
        expected_epoch: which process the speaker wants to talk to; 0 when it was asked.
        host_id: equal for workers that share memory.
        transports: that the speaker can use.
        layout: where its KV blocks are; None from a worker's service.
    """

    version: Number
    epoch: Number
    expected_epoch: Number
    host_id: str
    transports: list[str]
    layout: Layout | None


class Link(msgspec.Struct, tag="link", frozen=True):
    """Use this way from now on; `card` is the receiver's, `codec` the compression on the wire."""

    way: str
    card: bytes
    codec: str


class Linked(msgspec.Struct, tag="linked", frozen=True):
    """The sender's card, or why it cannot use that transport."""

    card: bytes
    error: str = ""


class Open(msgspec.Struct, tag="open", frozen=True):
    """The receiver waits for this handoff, and shows that it was told its token (`permits.opens`)."""

    handoff: HandoffId
    shown: Mac


class Started(msgspec.Struct, tag="started", frozen=True):
    """The prompt's computation has begun: `tokens` tokens with this digest (`handoff.digest_tokens`) will be sent.

    `shown` is the sender's proof that it was told the token (`permits.begins`).
    """

    handoff: HandoffId
    tokens: Count
    digest: Number
    shown: Mac


class Announce(msgspec.Struct, tag="announce", frozen=True):
    """The receiver has room for blocks `first` to `first + count` of the prompt."""

    handoff: HandoffId
    first: Count
    count: Count


class Sent(msgspec.Struct, tag="sent", frozen=True):
    """A span is ready to be taken: some blocks in some regions.

    Attributes:
        number: of the span, for Again.
        blocks: first block and count, in prompt order. block_ids: where they are at the sender.
        regions: first region and count.
        digests: of each piece, region by region and in each block by block (`pieces.digest`).
        ticket, length: where the bytes are, and how many; ticket 0 when the receiver reads them itself.
        send_ns: how long digesting and sending took.
    """

    handoff: HandoffId
    number: Number
    blocks: tuple[Count, Count]
    block_ids: list[Count]
    regions: tuple[Count, Count]
    digests: list[Number]
    ticket: Number
    length: Number
    send_ns: Number


class Computed(msgspec.Struct, tag="computed", frozen=True):
    """The last token of the prompt has been computed; what was not sent yet will come without further computation."""

    handoff: HandoffId


class Credit(msgspec.Struct, tag="credit", frozen=True):
    """A landing place."""

    handoff: HandoffId
    ticket: Number


class Again(msgspec.Struct, tag="again", frozen=True):
    """The span with this number was not intact."""

    handoff: HandoffId
    number: Number


class Done(msgspec.Struct, tag="done", frozen=True):
    """The receiver has a checked copy of all that it announced."""

    handoff: HandoffId


class Closed(msgspec.Struct, tag="closed", frozen=True):
    """The speaker has given the handoff up."""

    handoff: HandoffId
    code: str
    message: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Sign of life."""


class ProbeAsk(msgspec.Struct, tag="probe_ask", frozen=True):
    """Send `length` bytes of the probe memory to this ticket; with ticket 0 say only where that memory is."""

    ticket: Number
    length: Number


class ProbeSent(msgspec.Struct, tag="probe_sent", frozen=True):
    ticket: Number
    address: Number
    length: Number


class ProbePeer(msgspec.Struct, tag="probe_peer", frozen=True):
    """Measure the way from the worker at `address`, whose agent has this key, to this one."""

    address: str
    epoch: Number
    key: Key
    transport: str


class ProbeResult(msgspec.Struct, tag="probe_result", frozen=True):
    """`error` is empty when it went well."""

    transport: str = ""
    detail: str = ""
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    warning: str = ""
    error: str = ""


class Registered(msgspec.Struct, tag="registered", frozen=True):
    """These are the keys of the workers that are registered now; nobody else is served."""

    keys: list[Key]


class Noted(msgspec.Struct, tag="noted", frozen=True):
    """They hold from now on."""


Message = (
    Hello
    | Link
    | Linked
    | Open
    | Started
    | Announce
    | Sent
    | Computed
    | Credit
    | Again
    | Done
    | Closed
    | Ping
    | ProbeAsk
    | ProbeSent
    | ProbePeer
    | ProbeResult
    | Registered
    | Noted
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """Raises TransferError, `bad_message`: not one of ours."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"an unreadable control message: {error}", code="bad_message") from error


def frame(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader, limit_bytes: int) -> bytes | None:
    """The next frame's content; None when the other side has closed the connection.

    Raises:
        TransferError: `bad_message`: it is longer than may be.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > limit_bytes:
            raise TransferError(f"a control frame of {length} bytes, at most {limit_bytes}", code="bad_message")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None
