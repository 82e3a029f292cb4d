"""The transport for workers on one host, in two ways.

- `ShmDirect`: the receiver reads the blocks out of the sender's memory (`process_vm_readv`). One copy, straight to
  where the bytes belong, and the sender does nothing.
- `ShmStaged`: the sender copies into a landing area of the receiver in `/dev/shm`, the receiver copies out of it. For
  kernels and containers that forbid the first way, and for KV memory on a GPU.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from kv_transfer.board import open_own
from kv_transfer.transports.base import Run, Way
from kv_transfer.transports.landing import Landing, gather
from kv_transfer.transports.process_memory import allow_readers, read_process
from slipstream.errors import TransferError

T = TypeVar("T")

# What a peer may say of its landing area: a place is a span.
_MOST_PLACES, _LEAST_PLACE_BYTES = 1 << 20, 1024


class _DirectCard(msgspec.Struct, frozen=True):
    """`token` is a random number that lies at `address` in process `pid`, by which a reader knows it."""

    pid: int
    address: int
    token: int


class ShmDirect:
    """Args:
    readable: whether the KV cache is in host memory.
    """

    name = "shm"

    def __init__(self, *, readable: bool) -> None:
        self._readable = readable
        self._token = ctypes.c_uint64(secrets.randbits(64) or 1)

    async def open(self, memory: Sequence[Run]) -> None:
        if not self._readable:
            raise TransferError("KV memory on a GPU cannot be read by other processes", code="transport_unavailable")
        allow_readers()

    def card(self) -> bytes:
        return msgspec.msgpack.encode(_DirectCard(os.getpid(), ctypes.addressof(self._token), self._token.value))

    async def connect(self, card: bytes) -> DirectLink:
        peer = _read_card(card, _DirectCard)
        found = ctypes.c_uint64()
        link = DirectLink(peer.pid)
        link.read([Run(peer.address, 8)], [Run(ctypes.addressof(found), 8)])
        if found.value != peer.token:
            raise TransferError(
                f"process {peer.pid} is another one here: the workers do not share a PID namespace",
                code="transport_unavailable",
            )
        return link

    async def close(self) -> None:
        """Nothing is held."""


class DirectLink:
    """Reads one process's memory."""

    way = Way("shm", "direct")

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def read(self, sources: Sequence[Run], targets: Sequence[Run]) -> None:
        read_process(self._pid, sources, targets)

    async def close(self) -> None:
        """Nothing is held."""


class _StagedCard(msgspec.Struct, frozen=True):
    """The landing area: a file name in the workers' shared folder."""

    file: str
    places: int
    place_bytes: int


class ShmStaged:
    """Args:
    directory: shared by the workers of a host. stem: of the file's name, this worker's own.
    """

    name = "shm"

    def __init__(self, directory: Path, stem: str, *, span_bytes: int, landing_bytes: int) -> None:
        self._path = directory / f"{stem}-landing.kv"
        self._directory = directory
        self._places = max(1, landing_bytes // span_bytes)
        self._span_bytes = span_bytes
        self._map: mmap.mmap | None = None
        self._landing: Landing | None = None

    async def open(self, memory: Sequence[Run]) -> None:
        size = self._places * self._span_bytes
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)  # or writing to a full tmpfs would be a SIGBUS
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise TransferError(
                f"cannot make a landing area of {size} bytes (transfer.landing_bytes) in {self._directory}: "
                f"{error.strerror}",
                code="transport_unavailable",
            ) from error
        self._landing = Landing(self._places, self._span_bytes, memoryview(self._map))

    def card(self) -> bytes:
        return msgspec.msgpack.encode(_StagedCard(self._path.name, self._places, self._span_bytes))

    async def connect(self, card: bytes) -> StagedLink:
        peer = _read_card(card, _StagedCard)
        assert self._landing is not None, "open() comes first"
        if os.path.basename(peer.file) != peer.file or not peer.file.endswith("-landing.kv"):
            raise TransferError(f"{peer.file!r} does not name a landing area", code="bad_message")
        try:
            if not (0 < peer.places <= _MOST_PLACES and peer.place_bytes >= _LEAST_PLACE_BYTES):
                raise ValueError(f"{peer.places} places of {peer.place_bytes} bytes")
            with open_own(self._directory / peer.file) as file:
                theirs = mmap.mmap(file.fileno(), peer.places * peer.place_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise TransferError(
                f"the other worker's landing area {peer.file} cannot be mapped: {error}", code="transport_unavailable"
            ) from error
        return StagedLink(self._landing, Landing(peer.places, peer.place_bytes, memoryview(theirs)), theirs)

    async def close(self) -> None:
        self._path.unlink(missing_ok=True)  # whoever has it mapped keeps its pages until they let go
        self._landing = None


class StagedLink:
    """Own landing area for what comes in, the peer's for what goes out."""

    way = Way("shm", "staged")

    def __init__(self, own: Landing, theirs: Landing, mapped: mmap.mmap) -> None:
        self._own = own
        self._theirs = theirs
        self._mapped = mapped
        self.span_bytes = min(own.place_bytes, theirs.place_bytes)

    async def grant(self) -> int:
        return await self._own.grant()

    async def send(self, ticket: int, pieces: Sequence[Run]) -> None:
        place = self._theirs.place(ticket)
        if sum(piece.length for piece in pieces) > len(place):
            raise TransferError(f"a span is larger than a landing place of {len(place)} bytes", code="bad_handoff")
        await asyncio.to_thread(gather, pieces, place)

    async def receive(self, ticket: int, length: int) -> memoryview:
        return self._own.place(ticket)[:length]

    def release(self, ticket: int) -> None:
        self._own.release(ticket)

    async def close(self) -> None:
        """The map goes when the last copy into it has ended."""


def _read_card(card: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(card, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"an unreadable transport card: {error}", code="bad_message") from error
