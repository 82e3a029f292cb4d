"""What two transfer agents say to each other over their control connection, and how it is framed.

The worker that receives blocks opens the connection to the one that sends them. A frame is its length (4 bytes, big
endian) and one msgpack message. Block bytes never travel here; they go over a transport's link.

    receiver -> sender   Hello, Link, Open, Announce, Credit, Again, Done, Closed, Ping, ProbeAsk
    sender -> receiver   Hello, Linked, Started, Sent, Computed, Closed, Ping, ProbeSent
    a worker's service -> its own agent: ProbePeer, answered by ProbeResult
"""

from __future__ import annotations

import asyncio
import struct

import msgspec

from kv_transfer.layout import Layout
from slipstream.errors import TransferError

VERSION = 1
_LENGTH = struct.Struct(">I")
_MAX_FRAME_BYTES = 16 << 20


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message in both directions.

    Attributes:
        epoch: of the speaker's process; a restarted one has another.
        expected_epoch: which process the speaker wants to talk to; 0 when it was asked.
        host_id: equal for workers that share memory.
        transports: that the speaker can use.
        layout: where its KV blocks are; None from a worker's service.
    """

    version: int
    epoch: int
    expected_epoch: int
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
    """The receiver waits for this handoff."""

    handoff: bytes


class Started(msgspec.Struct, tag="started", frozen=True):
    """The prompt's computation has begun: `tokens` tokens with this digest (`handoff.digest_tokens`) will be sent."""

    handoff: bytes
    tokens: int
    digest: int


class Announce(msgspec.Struct, tag="announce", frozen=True):
    """The receiver has room for blocks `first` to `first + count` of the prompt."""

    handoff: bytes
    first: int
    count: int


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

    handoff: bytes
    number: int
    blocks: tuple[int, int]
    block_ids: list[int]
    regions: tuple[int, int]
    digests: list[int]
    ticket: int
    length: int
    send_ns: int


class Computed(msgspec.Struct, tag="computed", frozen=True):
    """The last token of the prompt has been computed; what was not sent yet will come without further computation."""

    handoff: bytes


class Credit(msgspec.Struct, tag="credit", frozen=True):
    """A landing place."""

    handoff: bytes
    ticket: int


class Again(msgspec.Struct, tag="again", frozen=True):
    """The span with this number was not intact."""

    handoff: bytes
    number: int


class Done(msgspec.Struct, tag="done", frozen=True):
    """The receiver has a checked copy of all that it announced."""

    handoff: bytes


class Closed(msgspec.Struct, tag="closed", frozen=True):
    """The speaker has given the handoff up."""

    handoff: bytes
    code: str
    message: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Sign of life."""


class ProbeAsk(msgspec.Struct, tag="probe_ask", frozen=True):
    """Send `length` bytes of the probe memory to this ticket; with ticket 0 say only where that memory is."""

    ticket: int
    length: int


class ProbeSent(msgspec.Struct, tag="probe_sent", frozen=True):
    ticket: int
    address: int
    length: int


class ProbePeer(msgspec.Struct, tag="probe_peer", frozen=True):
    """Measure the way from the worker at `address` to this one."""

    address: str
    epoch: int
    transport: str


class ProbeResult(msgspec.Struct, tag="probe_result", frozen=True):
    """`error` is empty when it went well."""

    transport: str = ""
    detail: str = ""
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    warning: str = ""
    error: str = ""


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
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def frame(message: Message) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None when the other side has closed the connection.

    Raises:
        TransferError: `bad_message`: not one of ours.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > _MAX_FRAME_BYTES:
            raise TransferError(f"a control frame of {length} bytes, at most {_MAX_FRAME_BYTES}", code="bad_message")
        return _decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError, OSError):
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"an unreadable control message: {error}", code="bad_message") from error
