"""The small interface that every way of moving blocks implements.

A transport is one worker's end of one way. It lives in the transfer agent's event loop and is only used there.
Two workers exchange `card`s over their control connection, each calls `connect` with the other's, and gets a link. A
link carries the bytes of one span (pieces of some blocks) at a time; which blocks they are, whether they are
intact and whether anybody still wants them is not its business.

There are two kinds of links:

- `ReadLink`: the receiver reads straight out of the sender's memory, into the place where the bytes belong.
- `LandingLink`: the sender brings the bytes to a landing place, from which the receiver takes them once it has checked
  them. So nothing that comes late, from a peer that was frozen or cut off, can reach memory that has a new use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable


class Run(NamedTuple):
    """A run of bytes in some process's memory."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Way:
    """What a link really uses: `shm` with `direct` or `staged`; `ucx` with `tcp/eth0`, `rc_mlx5/mlx5_0:1` ...

    Attributes:
        warning: a slow road where a faster one exists, and the setting to change; empty when all is well.
    """

    transport: str
    detail: str
    warning: str = ""

    def __str__(self) -> str:
        return f"{self.transport}/{self.detail}"


class Transport(Protocol):
    """One worker's end of one way.

    `open` before anything else, `close` last; a transport that is open and has no links uses no CPU.
    """

    @property
    def name(self) -> str:
        """`shm`, `ucx` or `nixl`."""
        ...

    async def open(self, memory: Sequence[Run]) -> None:
        """Get ready to send from `memory` (the KV cache, and whatever else is sent from).

        Raises:
            TransferError: `transport_unavailable`: not installed, or unusable here; the message says what to do.
        """
        ...

    def card(self) -> bytes:
        """What a peer needs in order to connect."""
        ...

    async def connect(self, card: bytes) -> ReadLink | LandingLink:
        """A link to the peer with this card. Both ends call it; one link carries spans in both directions.

        Raises:
            TransferError: `transport_unavailable`: the peer cannot be reached in this way.
        """
        ...

    async def close(self) -> None:
        """Give everything back, links included. Again is fine."""
        ...


@runtime_checkable
class ReadLink(Protocol):
    """A link on which the receiver reads out of the sender's memory; the sender does nothing."""

    @property
    def way(self) -> Way: ...

    def read(self, sources: Sequence[Run], targets: Sequence[Run]) -> None:
        """Copy `sources` (in the peer) to `targets` (here), pairwise of equal length. Blocks; called in a thread.

        Raises:
            TransferError: `not_permitted`, `worker_gone`.
        """
        ...

    async def close(self) -> None: ...


@runtime_checkable
class LandingLink(Protocol):
    """A link on which the sender brings spans to landing places of the receiver.

    A ticket stands for one landing place. The receiver makes it (`grant`) and tells it to the sender, which uses it
    once (`send`); then the receiver looks at the bytes (`receive`) and gives the place back (`release`). A
    ticket may be released at any time, also when its bytes have not come, or never will.
    """

    @property
    def way(self) -> Way: ...

    @property
    def span_bytes(self) -> int:
        """Most bytes under one ticket."""
        ...

    async def grant(self) -> int:
        """Receiver: a new ticket (positive, below 2**63). Waits while all places are taken."""
        ...

    async def send(self, ticket: int, pieces: Sequence[Run]) -> None:
        """Sender: bring these pieces, one after the other, to the ticket's place; returns once `pieces` may change.

        Cancelling gives up waiting; the bytes may or may not arrive.

        Raises:
            TransferError: `worker_gone` (the peer cannot be reached any more), `bad_handoff` (no such ticket).
        """
        ...

    async def receive(self, ticket: int, length: int) -> memoryview:
        """Receiver: the bytes under this ticket, once they are here. Valid until `release`.

        The peer has said over the control connection that it sent them, so they are here or on their way.

        Raises:
            TransferError: `worker_gone`.
        """
        ...

    def release(self, ticket: int) -> None:
        """Receiver: the place is free again; unknown tickets are ignored."""
        ...

    async def close(self) -> None:
        """End the link; waiting calls on it raise `worker_gone`."""
        ...


Link = ReadLink | LandingLink
