"""The other end of a transport: a process of its own that does what it is told.

    python -m tests.support.transport_peer TRANSPORT FOLDER

TRANSPORT is a key of `TRANSPORTS`, FOLDER what workers of one host share. Says its card in the first line; then reads a
JSON list per line from standard input, `[number, command, arguments...]`, and answers each with `[number, result]`, or
`[number, {"error": code}]`. Commands run side by side. It ends when standard input closes.

    connect CARD          make the link                            -> the way, as text
    grant                 a ticket                                 -> ticket
    send TICKET SEED LENGTHS   pieces with the pattern of SEED     -> null
    receive TICKET LENGTH      wait for a span, and release it     -> SHA-256 of its bytes
    release TICKET                                                 -> null
    close                 end the link                             -> null
    cpu                                                            -> CPU seconds used so far
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from kv_transfer.transports.base import LandingLink, Run, Transport
from kv_transfer.transports.nixl import NixlTransport
from kv_transfer.transports.shm import ShmStaged
from kv_transfer.transports.ucx import UcxTransport
from slipstream.errors import TransferError
from tests.support.answer_pipe import take_standard_output

SPAN_BYTES = 1 << 20
PLACES = 4
REGIONS = 8
REGION_BYTES = 2 << 20

Factory = Callable[[Path, str], Transport]


def _ucx(folder: Path, stem: str) -> Transport:
    return UcxTransport(span_bytes=SPAN_BYTES, landing_bytes=PLACES * SPAN_BYTES, host=None)


def _shm_staged(folder: Path, stem: str) -> Transport:
    return ShmStaged(folder, stem, span_bytes=SPAN_BYTES, landing_bytes=PLACES * SPAN_BYTES)


def _nixl(folder: Path, stem: str) -> Transport:
    return NixlTransport(backend="UCX", span_bytes=SPAN_BYTES, landing_bytes=PLACES * SPAN_BYTES, host=None)


TRANSPORTS: dict[str, Factory] = {"ucx": _ucx, "nixl": _nixl, "shm-staged": _shm_staged}


class Memory:
    """What a worker sends from: bytes of which everybody knows what they should be."""

    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(REGIONS * REGION_BYTES)
        self._free = [ctypes.addressof(self._bytes) + i * REGION_BYTES for i in range(REGIONS)]
        self.run = Run(self._free[0], REGIONS * REGION_BYTES)

    @contextlib.contextmanager
    def pieces(self, seed: int, lengths: Sequence[int]) -> Iterator[list[Run]]:
        """The pattern of `seed` in pieces that neither touch nor lie in order; others use other memory meanwhile."""
        base = self._free.pop()
        order = list(range(len(lengths)))
        random.Random(seed).shuffle(order)
        offsets = dict(zip(order, _apart([lengths[i] for i in order], first=64 * (seed % 7)), strict=True))
        runs = [Run(base + offsets[i], length) for i, length in enumerate(lengths)]
        content = memoryview(pattern(seed, sum(lengths)))
        for run in runs:
            ctypes.memmove(run.address, bytes(content[: run.length]), run.length)
            content = content[run.length :]
        try:
            yield runs
        finally:
            ctypes.memset(base, 0, REGION_BYTES)  # the transport has said that it needs them no more
            self._free.append(base)


def _apart(lengths: Sequence[int], *, first: int) -> list[int]:
    offsets = []
    for length in lengths:
        offsets.append(first)
        first += length + 192
    assert first <= REGION_BYTES
    return offsets


def pattern(seed: int, length: int) -> bytes:
    """The bytes of `seed`."""
    return random.Random(seed).randbytes(length)


class Commands:
    def __init__(self, transport: Transport, memory: Memory) -> None:
        self._transport = transport
        self._memory = memory
        self._link: LandingLink | None = None

    async def do(self, command: str, *arguments: Any) -> object:
        result: object = await getattr(self, command)(*arguments)
        return result

    async def connect(self, card: str) -> str:
        link = await self._transport.connect(bytes.fromhex(card))
        assert isinstance(link, LandingLink)
        self._link = link
        return str(link.way)

    async def grant(self) -> int:
        return await self.link.grant()

    async def send(self, ticket: int, seed: int, lengths: list[int]) -> None:
        with self._memory.pieces(seed, lengths) as pieces:
            await self.link.send(ticket, pieces)

    async def receive(self, ticket: int, length: int) -> str:
        try:
            return hashlib.sha256(await self.link.receive(ticket, length)).hexdigest()
        finally:
            self.link.release(ticket)

    async def release(self, ticket: int) -> None:
        self.link.release(ticket)

    async def close(self) -> None:
        await self.link.close()

    async def cpu(self) -> float:
        return time.process_time()

    @property
    def link(self) -> LandingLink:
        assert self._link is not None, "connect comes first"
        return self._link


async def main() -> None:
    out = take_standard_output()

    def say(line: str) -> None:
        out.write(line.encode() + b"\n")
        out.flush()

    name, folder = sys.argv[1], Path(sys.argv[2])
    memory = Memory()
    transport = TRANSPORTS[name](folder, f"peer-{random.SystemRandom().getrandbits(64):016x}")
    await transport.open([memory.run])
    commands = Commands(transport, memory)
    lines = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    say(transport.card().hex())

    async def answer(number: int, command: str, *arguments: Any) -> None:
        try:
            result = await commands.do(command, *arguments)
        except TransferError as error:
            result = {"error": error.code}
        say(json.dumps([number, result]))

    async with asyncio.TaskGroup() as tasks:
        running = []
        while line := await lines.readline():
            running.append(tasks.create_task(answer(*json.loads(line))))
        for task in running:
            task.cancel()
    await transport.close()


if __name__ == "__main__":
    # A transport lives in the loop of the transfer agent, which is not in the main thread.
    thread = threading.Thread(target=lambda: uvloop.run(main()))
    thread.start()
    thread.join()
