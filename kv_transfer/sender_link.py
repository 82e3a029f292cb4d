"""A receiver's connection to one sender: found, agreed on a way, and shared by all handoffs from there.

It lives until the sender is gone or the agent ends. Whatever ends it ends its handoffs, with the same error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from kv_transfer import wire
from kv_transfer.channel import Channel
from kv_transfer.door import Door
from kv_transfer.inbound import Inbound, Sender
from kv_transfer.kv_memory import Codec
from kv_transfer.layout import Layout
from kv_transfer.path_probe import probe
from kv_transfer.transports.base import LandingLink, ReadLink
from kv_transfer.ways import Transports, to_try
from slipstream import telemetry
from slipstream.errors import TransferError

log = telemetry.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Terms:
    """What this worker brings to an agreement with another one.

    Attributes:
        asked, mode: `transfer.transport` and `transfer.mode`. codec: `transfer.compression`.
        codec_of: the codec of that name for this worker's memory; None: bytes travel as they are.
        setup_s: longest a connection and the agreement on a way may take.
    """

    epoch: int
    host_id: str
    transports: list[str]
    layout: Layout
    asked: str
    mode: str
    codec: str
    codec_of: Callable[[str], Codec | None]
    rdma: bool
    silence_s: float
    setup_s: float

    def hello(self, expected_epoch: int = 0) -> wire.Hello:
        return wire.Hello(wire.VERSION, self.epoch, expected_epoch, self.host_id, self.transports, self.layout)


class SenderLink:
    """See the module's docstring.

    Args:
        key: the public key of the sender's agent.
        asked: a transport's name to use instead of `terms.asked`, for a probe.
    """

    def __init__(
        self, address: str, epoch: int, key: bytes, door: Door, terms: Terms, transports: Transports, asked: str = ""
    ) -> None:
        self.address = address
        self.epoch = epoch
        self._key = key
        self._door = door
        self.last_used_s = time.monotonic()
        self._terms = terms
        self._asked = asked or terms.asked
        self._transports = transports
        self._ready: asyncio.Future[Sender] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # seen, whoever waits
        self._inbounds: dict[bytes, Inbound] = {}
        self._probed: asyncio.Queue[wire.ProbeSent] = asyncio.Queue()
        self._probing = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None

    def start(self, spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]) -> None:
        """Connect and serve, in a task."""
        self._running = spawn(self._run(), f"sender-{self.address}")

    def close(self) -> None:
        """End it; its handoffs fail."""
        if self._running is not None:
            self._running.cancel()

    @property
    def ended(self) -> bool:
        return self._running is not None and self._running.done()

    async def _run(self) -> None:
        """Connect, then pass messages on until the connection ends."""
        error = TransferError("this worker is shutting down", code="worker_gone")
        try:
            async with self._agreed() as (line, sender):
                try:
                    self._ready.set_result(sender)
                    while True:
                        self._deliver(await line.next())
                finally:
                    await sender.link.close()
        except TransferError as failure:
            error = failure
            log.warning("sender_link_ended", address=self.address, code=error.code, error=error.message)
        finally:
            if not self._ready.done():
                self._ready.set_exception(error)
            for inbound in list(self._inbounds.values()):
                inbound.failed(error)
            self._inbounds.clear()

    async def _sender(self) -> Sender:
        return await asyncio.shield(self._ready)

    async def open(self, inbound: Inbound) -> None:
        """Ask the sender for this handoff; whatever comes of it, `inbound` is told."""
        try:
            sender = await self._sender()
        except TransferError as error:
            inbound.failed(error)
            return
        if self.ended:
            inbound.failed(TransferError(f"the connection to {self.address} was lost", code="worker_gone"))
        elif not inbound.ended:
            self._inbounds[inbound.handoff.id] = inbound
            inbound.connected(sender)

    def forget(self, handoff_id: bytes) -> None:
        """This handoff has ended."""
        self._inbounds.pop(handoff_id, None)
        self.last_used_s = time.monotonic()

    @property
    def busy(self) -> bool:
        return bool(self._inbounds) or self._probing.locked()

    async def measure(self, timeout_s: float) -> wire.ProbeResult:
        """Bandwidth and latency of the way, now. Handoffs go on meanwhile.

        Raises:
            TransferError
        """
        sender = await self._sender()
        async with self._probing:
            while not self._probed.empty():
                self._probed.get_nowait()
            return await probe(sender, self._probed, timeout_s)

    def _deliver(self, message: wire.Message) -> None:
        if isinstance(message, wire.ProbeSent):
            self._probed.put_nowait(message)
            return
        inbound = self._inbounds.get(getattr(message, "handoff", b""))
        match message:
            case _ if inbound is None:
                pass  # about a handoff that has ended here
            case wire.Started():
                self._begin(inbound, message)
            case wire.Sent():
                inbound.sent(message)
            case wire.Computed():
                inbound.computed()
            case wire.Closed():
                inbound.failed(TransferError(message.message, code=message.code))
            case _:
                raise TransferError(f"unexpected {type(message).__name__} from a sender", code="bad_message")

    def _begin(self, inbound: Inbound, message: wire.Started) -> None:
        try:
            inbound.started(message)
        except TransferError as error:  # of this handoff; the others from there may be in order
            self._door.count(error)
            inbound.failed(error)

    # -- agreement ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _agreed(self) -> AsyncIterator[tuple[Channel, Sender]]:
        terms = self._terms
        async with self._door.dialed(self.address, self._key, terms.setup_s) as line:
            try:
                async with asyncio.timeout(terms.setup_s):
                    line.post(terms.hello(self.epoch))
                    hello = await line.next()
                    layout = self._checked(hello)
                    assert isinstance(hello, wire.Hello)
                    way, link = await self._agree(line, hello)
            except TimeoutError as error:
                raise TransferError(
                    f"no way to {self.address} was found in {terms.setup_s:g} s", code="worker_gone"
                ) from error
            codec = terms.codec_of(self._codec(way)) if isinstance(link, LandingLink) else None
            log.info("path_agreed", address=self.address, way=str(link.way), codec=self._codec(way))
            if link.way.warning:
                log.warning("slow_path", address=self.address, way=str(link.way), remedy=link.way.warning)
            yield line, Sender(line.post, line.session, link, codec, layout)

    def _checked(self, hello: wire.Message) -> Layout:
        """The sender's layout, if it is the worker that was meant and its blocks fit here."""
        if not isinstance(hello, wire.Hello) or hello.layout is None:
            raise TransferError(f"{self.address} is no transfer agent", code="bad_message")
        if hello.version != wire.VERSION:
            raise TransferError(
                f"{self.address} speaks version {hello.version}, this worker {wire.VERSION}: run one version on all",
                code="bad_message",
            )
        if hello.epoch != self.epoch:
            raise TransferError(f"the worker at {self.address} was restarted", code="worker_gone")
        if hello.layout.fingerprint != self._terms.layout.fingerprint:
            raise TransferError("the two workers' KV layouts differ (model, dtype, block size or CPU)", code="layout")
        theirs, own = hello.layout, self._terms.layout
        if theirs.rank not in own.partners(theirs.ranks):
            raise TransferError(
                f"{self.address} is rank {theirs.rank} of {theirs.ranks}, of which rank {own.rank} of {own.ranks} has "
                "no use (worker.tensor_parallel_size)",
                code="layout",
            )
        here, there = own.share(theirs.rank, theirs.ranks), own.seen_from(theirs.rank, theirs.ranks)
        if (here.parts > 1 and not own.by_head) or (there.parts > 1 and not theirs.by_head):
            raise TransferError(
                f"worker.tensor_parallel_size is {theirs.ranks} there and {own.ranks} here, and this engine's blocks "
                "do not have one KV head after the other: give both workers the same size",
                code="layout",
            )
        return theirs

    def _codec(self, way: str) -> str:
        return "none" if way.startswith("shm/") else self._terms.codec

    async def _agree(self, line: Channel, hello: wire.Hello) -> tuple[str, ReadLink | LandingLink]:
        terms = self._terms
        ways = to_try(
            self._asked,
            terms.mode,
            same_host=bool(terms.host_id) and terms.host_id == hello.host_id,
            rdma=terms.rdma,
            own=terms.transports,
            peer=hello.transports,
        )
        reasons = []
        for way in ways:
            try:
                return way, await self._try(line, way)
            except TransferError as error:
                if error.code == "worker_gone":
                    raise
                reasons.append(f"{way}: {error.message}")
                log.warning("way_refused", address=self.address, way=way, error=error.message)
        raise TransferError(f"no way to {self.address}: {'; '.join(reasons)}", code="no_path")

    async def _try(self, line: Channel, way: str) -> ReadLink | LandingLink:
        transport = await self._transports.get(way)
        line.post(wire.Link(way, transport.card(), self._codec(way)))
        answer = await line.next()
        if not isinstance(answer, wire.Linked):
            raise TransferError(f"unexpected {type(answer).__name__} from a sender", code="bad_message")
        if answer.error:
            raise TransferError(answer.error, code="transport_unavailable")
        return await transport.connect(answer.card)
