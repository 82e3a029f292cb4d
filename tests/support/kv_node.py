"""A transfer agent over KV blocks whose bytes every test knows.

`KvNode` is one, in the process that makes it; `tests.support.kv_peer` has one in a process of its own. Both are used
in the same way: handoffs are named by 32 hex digits, which are the request's id too, and what has happened is a list
of `Happening`s.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import importlib.util
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from kv_transfer import layout as layouts
from kv_transfer.agent import TransferAgent
from kv_transfer.exchange import Event, Limits, Received, Started
from kv_transfer.extents import Extent
from kv_transfer.handoff import Handoff
from kv_transfer.inbound import Want
from kv_transfer.kv_memory import KvMemory
from kv_transfer.layout import Layout
from kv_transfer.permits import Permit
from kv_transfer.sender_link import Terms
from kv_transfer.transports.base import Transport
from kv_transfer.transports.nixl import NixlTransport
from kv_transfer.transports.shm import ShmDirect, ShmStaged
from kv_transfer.transports.ucx import UcxTransport
from kv_transfer.ways import Factory
from tests.support.kv_stranger import identity, token

# Every way that blocks can take, and the module that has to be installed for it.
WAYS = {"shm/direct": "mmap", "shm/staged": "mmap", "ucx": "ucxx", "nixl": "nixl"}
BLOCKS = 48
REGIONS = 4
DEADLINE_S = 20.0

Wrap = Callable[[Transport], Transport]


def is_installed(way: str) -> bool:
    return importlib.util.find_spec(WAYS[way]) is not None


def new_handoff() -> str:
    return os.urandom(16).hex()


def content(seed: str, region: int, length: int) -> bytes:
    """The bytes of a block that was written with this seed: the same in every process."""
    pattern = hashlib.sha256(f"{seed}/{region}".encode()).digest()
    return (pattern * (length // len(pattern) + 1))[:length]


class Options(msgspec.Struct, frozen=True):
    """What a node is like.

    Attributes:
        way: how blocks come to it. width: numbers in a head; a block has 384 bytes for each.
        identity: by this name others know it; registered: those that it knows.
        rank, ranks, heads: a rank of a worker whose blocks have one head after the other; 0 heads: other caches.
        port: 0 takes a free one. small_bytes: what is copied in the event loop, in a peer; else in a thread.
    """

    folder: str
    epoch: int
    way: str = "shm/direct"
    width: int = 8
    port: int = 0
    fingerprint: str = "tests"
    host_id: str = "here"
    timeout_s: float = 10.0
    parked_s: float = 30.0
    silence_s: float = 5.0
    budget: int = 8
    span_bytes: int = 4096
    places: int = 16
    small_bytes: int | None = None
    identity: str = "node"
    registered: tuple[str, ...] = ("node",)
    rank: int = 0
    ranks: int = 1
    heads: int = 0


class Happening(msgspec.Struct, frozen=True):
    """An event of the agent. `kind` is Started, Received or Taken; `error` a code, empty when all went well."""

    kind: str
    handoff: str
    error: str = ""
    message: str = ""
    tokens: int = 0
    digest: int = 0
    blocks: int = 0
    wire_bytes: int = 0
    again: int = 0
    way: str = ""


class Census(msgspec.Struct, frozen=True):
    """What an agent has in its hands."""

    tasks: int
    threads: int
    fds: int
    handoffs: int


class Watched(ABC):
    """Remembers what has happened."""

    def __init__(self) -> None:
        self.seen: list[Happening] = []

    @abstractmethod
    def take(self, wait_s: float) -> list[Happening]:
        """What has happened since the last call; waits for it at most this long."""

    def all_of(self, kind: str, handoff: str) -> list[Happening]:
        return [event for event in self.seen if (event.kind, event.handoff) == (kind, handoff)]

    def until(self, kind: str, handoff: str, deadline_s: float = DEADLINE_S) -> Happening:
        """The first event of this kind for this handoff."""
        until_s = time.monotonic() + deadline_s
        while not (found := self.all_of(kind, handoff)):
            assert time.monotonic() < until_s, f"no {kind} in {deadline_s} s; there were {self.seen[-5:]}"
            self.seen += self.take(0.2)
        return found[0]

    def watch(self, seconds: float) -> None:
        """Look on for a while."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.seen += self.take(0.02)


class KvNode(Watched):
    """See the module's docstring. Close it."""

    def __init__(self, options: Options, wrap: Wrap = lambda transport: transport) -> None:
        super().__init__()
        self.options = options
        self._caches = _by_head(options) if options.heads else _caches(options.width)
        views = layouts.block_views(self._caches, BLOCKS)
        self.memory = KvMemory(views, dtype="float32")
        self.block_bytes = self.memory.block_bytes
        self.refill()
        place = options.rank, options.ranks, max(1, options.heads)
        self.layout = Layout(options.fingerprint, BLOCKS, 16, self.memory.regions, *place, by_head=options.heads > 0)
        self.refused: list[str] = []
        self.agent = _agent(options, self.memory, self.layout, wrap, self.refused)
        self.agent.start()
        self.address = self.agent.address
        self.epoch = options.epoch

    def take(self, wait_s: float) -> list[Happening]:
        if wait_s > 0:
            self.agent.news.wait(wait_s)
        return [_happening(event) for event in self.agent.take_events()]

    def close(self) -> None:
        self.agent.stop()

    # -- its memory ---------------------------------------------------------------------------------------

    def read(self, block: int) -> list[bytes]:
        """The bytes of a block, region by region."""
        return [bytes(self.memory.piece(region, block)) for region in range(REGIONS)]

    def write(self, block: int, seed: str) -> None:
        """Overwrite a block with the bytes that `content` gives."""
        for region, length in enumerate(self.memory.piece_bytes):
            self.memory.fill(region, block, memoryview(bytearray(content(seed, region, length))))

    def refill(self) -> None:
        """All blocks as they were in the beginning: written with EPOCH-BLOCK."""
        for block in range(BLOCKS):
            self.write(block, f"{self.options.epoch}-{block}")

    def holds(self, block: int, seed: str) -> bool:
        return self.read(block) == [content(seed, r, length) for r, length in enumerate(self.memory.piece_bytes)]

    def census(self) -> Census:
        loop, exchange = self.agent._loop, self.agent._exchange
        assert loop is not None
        assert exchange is not None
        found: list[tuple[int, int]] = []
        done = threading.Event()

        def count() -> None:
            handoffs = len(exchange._inbounds) + len(exchange._outbounds) + len(exchange._parked)
            found.append((len(asyncio.all_tasks(loop)), handoffs + len(self.agent._fences)))
            done.set()

        loop.call_soon_threadsafe(count)
        assert done.wait(DEADLINE_S)
        return Census(found[0][0], threading.active_count(), len(os.listdir("/proc/self/fd")), found[0][1])

    # -- as a sender --------------------------------------------------------------------------------------

    def begin(self, handoff: str, tokens: int = 100, digest: int = 7, receiver: str = "node") -> None:
        self.agent.expect(Permit(bytes.fromhex(handoff), token(handoff), identity(receiver).public))
        self.agent.begin(bytes.fromhex(handoff), tokens, digest)

    def publish(
        self, handoff: str, ids: list[int], first: int = 0, end: int = -1, region: int = 0, region_end: int = REGIONS
    ) -> None:
        """Blocks [first, end) of the prompt, all of `ids` by default, in these regions."""
        extent = Extent(first, len(ids) if end < 0 else end, region, region_end)
        self.agent.publish(bytes.fromhex(handoff), ids, extent)

    def computed(self, handoff: str) -> None:
        self.agent.computed(bytes.fromhex(handoff))

    def send(self, handoff: str, ids: list[int]) -> None:
        """All of a prompt at once."""
        self.begin(handoff)
        self.publish(handoff, ids)
        self.computed(handoff)

    def reset(self, handoff: str) -> None:
        self.agent.reset([bytes.fromhex(handoff)])

    def end(self, handoff: str, code: str = "lease_ended") -> None:
        self.agent.end(bytes.fromhex(handoff), code, "the lease on the blocks has ended")

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    # -- as a receiver ------------------------------------------------------------------------------------

    def open(
        self, handoff: str, address: str, epoch: int, sender: str = "node", told: str = "", ranks: Sequence[str] = ()
    ) -> None:
        """`told` is the handoff whose token this node was told, if it is another one."""
        key = identity(sender).public
        handoff_id = bytes.fromhex(handoff)
        self.agent.open(handoff, Handoff(handoff_id, address, epoch, key, token(told or handoff), tuple(ranks)))

    def receive(self, handoff: str, targets: Sequence[int], first: int = 0) -> None:
        self.agent.receive(handoff, Want(first, list(targets)))

    def cancel(self, handoff: str) -> None:
        self.agent.cancel(handoff)

    def fetch(self, handoff: str, address: str, epoch: int, targets: Sequence[int], first: int = 0) -> Happening:
        """Open, receive, and what came of it."""
        self.open(handoff, address, epoch)
        self.until("Started", handoff)
        self.receive(handoff, targets, first)
        return self.until("Received", handoff)


def _caches(width: int) -> dict[str, torch.Tensor]:
    """Three layers: one as it comes, one permuted, one with K and V apart."""
    return {
        "layers.0": torch.zeros(BLOCKS, 2, 16, width),
        "layers.1": torch.zeros(BLOCKS, 16, 2, width).permute(0, 2, 1, 3),
        "layers.2": torch.zeros(2, BLOCKS, 16, width),
    }


def _by_head(options: Options) -> dict[str, torch.Tensor]:
    heads = max(1, options.heads // options.ranks)
    return {f"layers.{number}": torch.zeros(BLOCKS, heads, 16, options.width) for number in range(REGIONS)}


def _agent(options: Options, memory: KvMemory, layout: Layout, wrap: Wrap, refused: list[str]) -> TransferAgent:
    transport, _, mode = options.way.partition("/")
    terms = Terms(
        epoch=options.epoch,
        host_id=options.host_id,
        transports=sorted({way.partition("/")[0] for way in WAYS if is_installed(way)}),
        layout=layout,
        asked=transport,
        mode=mode or "auto",
        codec="none",
        codec_of=lambda name: None,
        rdma=False,
        silence_s=options.silence_s,
        setup_s=10.0,
    )
    limits = Limits(options.timeout_s, options.parked_s, options.budget, options.span_bytes)

    def staged() -> Transport:
        return wrap(
            ShmStaged(
                Path(options.folder),
                f"node-{options.epoch:x}-{options.rank}",
                span_bytes=options.span_bytes,
                landing_bytes=options.places * options.span_bytes,
            )
        )

    landing_bytes = options.places * options.span_bytes
    factories: dict[str, Factory] = {
        "shm/direct": lambda: wrap(ShmDirect(readable=True)),
        "shm/staged": staged,
        "ucx": lambda: wrap(UcxTransport(span_bytes=options.span_bytes, landing_bytes=landing_bytes, host="127.0.0.1")),
        "nixl": lambda: wrap(
            NixlTransport(backend="UCX", span_bytes=options.span_bytes, landing_bytes=landing_bytes, host="127.0.0.1")
        ),
    }
    return TransferAgent(
        memory,
        terms,
        limits,
        factories,
        host="127.0.0.1",
        port=options.port,
        identity=identity(options.identity),
        refused=refused.append,
        owner=identity("owner").public,
        registered=[identity(name).public for name in options.registered],
    )


def _happening(event: Event) -> Happening:
    match event:
        case Started(request_id, tokens, digest):
            return Happening("Started", request_id, tokens=tokens, digest=digest)
        case Received(request_id, tally, error):
            return Happening(
                "Received",
                request_id,
                error.code if error else "",
                error.message if error else "",
                blocks=tally.blocks,
                wire_bytes=tally.wire_bytes,
                again=tally.again,
                way=tally.way,
            )
        case taken:
            return Happening("Taken", taken.handoff_id.hex(), taken.refused)


def flip(address: int) -> None:
    """Change one byte of memory."""
    ctypes.c_ubyte.from_address(address).value ^= 0xFF
