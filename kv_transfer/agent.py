"""The transfer agent: one thread with an event loop inside the engine's process, which owns all transfers.

The engine's thread tells it what to do and picks up what has happened (`take_events`); neither ever waits for the
other. It has its own thread because the engine's is in a forward pass most of the time, and blocks must flow meanwhile.
Everything with state lives in the loop (`Exchange`); the methods here only hand over to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import uvloop

from kv_transfer.door import Door
from kv_transfer.exchange import Event, Exchange, Limits
from kv_transfer.extents import Extent
from kv_transfer.handoff import Handoff
from kv_transfer.identity import Identity, Peers
from kv_transfer.inbound import Want
from kv_transfer.kv_memory import KvMemory, SendBuffer
from kv_transfer.outbound import Fence
from kv_transfer.path_probe import ProbeMemory
from kv_transfer.permits import Permit
from kv_transfer.sender_link import Terms
from kv_transfer.ways import Factory, Transports
from slipstream import telemetry
from slipstream.addresses import host_port
from slipstream.errors import StartupError

log = telemetry.get_logger(__name__)

# Copying and digesting release the GIL: one piece is copied while another one is digested.
_THREADS = 2
_SEND_BUFFERS = 4
_STOP_S = 5.0


class TransferAgent:
    """See the module's docstring.

    Args:
        factories: of the transports, by way (see `ways.Transports`).
        host, port: where receivers connect to; port 0 takes a free one.
        identity: this agent's. owner, refused: see `door.Door`.
        registered: the keys of those that are known from the start; the owner tells the others.
    """

    def __init__(
        self,
        memory: KvMemory,
        terms: Terms,
        limits: Limits,
        factories: Mapping[str, Factory],
        *,
        host: str,
        port: int,
        identity: Identity,
        refused: Callable[[str], None],
        owner: bytes = b"",
        registered: Iterable[bytes] = (),
    ) -> None:
        self.key = identity.public
        self._door = Door(identity, Peers(registered), silence_s=terms.silence_s, refused=refused, owner=owner)
        self._memory = memory
        self._terms = terms
        self._limits = limits
        self._factories = factories
        self._host, self._port = host, port
        self._events: deque[Event] = deque()
        self.news = threading.Event()  # set when there are events to take
        self._fences: dict[bytes, Fence] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-copy")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exchange: Exchange | None = None
        self._stopping: asyncio.Event | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
        self.address = ""

    def start(self) -> None:
        """Listen; returns when `address` is known.

        Raises:
            StartupError: the address cannot be listened on.
        """
        self._thread.start()
        self._started.wait()
        if isinstance(self._failure, OSError):
            raise StartupError(
                f"transfer.port: cannot listen on {self._host}:{self._port}: {self._failure}"
            ) from self._failure
        if self._failure is not None:
            raise StartupError(f"the transfer agent cannot start: {self._failure}") from self._failure

    def stop(self) -> None:
        """End all transfers; those that were under way fail."""
        if self._stopping is not None:
            self._tell(self._stopping.set)
        self._thread.join(_STOP_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take_events(self) -> list[Event]:
        """What has happened since the last call."""
        self.news.clear()
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken

    # -- as a receiver ------------------------------------------------------------------------------------

    def open(self, request_id: str, handoff: Handoff) -> None:
        """Wait for this handoff: `Started` follows, or `Received` with an error."""
        self._tell(self._within.open, request_id, handoff)

    def receive(self, request_id: str, want: Want) -> None:
        """There is room for the blocks of a handoff that has started: `Received` follows, once."""
        self._tell(self._within.receive, request_id, want)

    def cancel(self, request_id: str) -> None:
        """Give an inbound handoff up: `Received` follows, when its blocks are not written to any more."""
        self._tell(self._within.cancel, request_id)

    # -- as a sender --------------------------------------------------------------------------------------

    def expect(self, permit: Permit) -> None:
        """A prompt that is to be handed over waits to be computed: so may its receiver, as long as it takes."""
        fence = self._fences.setdefault(permit.handoff, Fence())
        self._tell(self._within.expect, permit, fence)

    def begin(self, handoff_id: bytes, tokens: int, digest: int) -> None:
        """A prompt that is expected is being computed from now on (again, after a `reset`)."""
        self._tell(self._within.begin, handoff_id, tokens, digest)

    def publish(self, handoff_id: bytes, block_ids: list[int], extent: Extent) -> None:
        """These pieces are finished; `block_ids` is the prompt's block table as far as the extent needs it."""
        fence = self._fences.get(handoff_id)
        if fence is not None:
            self._tell(self._within.publish, handoff_id, fence.generation, block_ids, extent)

    def computed(self, handoff_id: bytes) -> None:
        """All of the prompt is finished."""
        self._tell(self._within.computed, handoff_id)

    def reset(self, handoff_ids: Iterable[bytes]) -> None:
        """Their blocks may be overwritten as soon as this returns."""
        for handoff_id in handoff_ids:
            fence = self._fences.get(handoff_id)
            if fence is not None:
                fence.generation += 1
                self._tell(self._within.reset, handoff_id)

    def end(self, handoff_id: bytes, code: str, message: str) -> None:
        """The lease has ended: like `reset`, and whoever still receives is told why."""
        self.reset([handoff_id])
        self._fences.pop(handoff_id, None)
        self._tell(self._within.end, handoff_id, code, message)

    @property
    def _within(self) -> Exchange:
        assert self._exchange is not None, "start() comes first"
        return self._exchange

    def _tell(self, work: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None, "start() comes first"
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all that it could be told
            self._loop.call_soon_threadsafe(work, *arguments)

    # -- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as error:
                self._failure = error
                if self._started.is_set():
                    log.exception("transfer_agent_died")
            finally:
                self._started.set()

    async def _serve(self) -> None:
        encoded = self._terms.codec != "none" or not self._memory.on_host
        buffers = [SendBuffer(self._limits.span_bytes) for _ in range(_SEND_BUFFERS if encoded else 0)]
        probed = ProbeMemory()
        runs = [*self._memory.runs(), *(buffer.run for buffer in buffers), probed.run]
        transports = Transports(self._factories, runs, self._terms.setup_s)
        exchange = Exchange(
            self._memory,
            self._door,
            self._terms,
            self._limits,
            transports,
            self._happened,
            self._pool,
            buffers,
            probed,
        )
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(exchange.welcome, self._host, self._port)
        port = server.sockets[0].getsockname()[1]
        self.address = host_port(self._host, port)
        self._exchange, self._loop = exchange, asyncio.get_running_loop()
        self._started.set()
        tidying = asyncio.create_task(exchange.tidy())
        try:
            await self._stopping.wait()
        finally:
            tidying.cancel()
            server.close()
            await exchange.close()

    def _happened(self, event: Event) -> None:
        self._events.append(event)
        self.news.set()
