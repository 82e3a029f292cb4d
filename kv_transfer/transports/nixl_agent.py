"""A thread that owns a NIXL agent.

NIXL's own progress thread takes a whole core, also while nothing is under way, so it is off here; then bytes move only
while somebody calls into the agent. This thread does: it sleeps until there is work, looks often (every 50 us) while
bytes are moving, less often when nothing has happened for a while, and not at all when nothing can come. A thread and
not the event loop, because

- posting a write may copy the bytes right there (one host, 2 ms for 16 MiB), with the interpreter lock released;
- sleeps below a millisecond are needed, which event loops do not have;
- an agent is not thread-safe, and some of its calls wait for the network.

A call into NIXL may never return: its LIBFABRIC backend tries again for ever, with the core that takes, when the
`tcp` provider has no connection to a peer (any more). Then every later call here fails at once, until that one is over.

When a write has to be given up, its handle is released. NIXL then cancels it as far as its backend can, and says so
when it cannot: such a handle is kept and tried again later. UCX always lets go at once, though what it has already
queued may still be read and sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kv_transfer.transports.base import Run
from slipstream.errors import TransferError

T = TypeVar("T")

# How long between two looks, by how long ago something last happened (a call, a write that ended, a message).
_BUSY_S, _BUSY_PAUSE_S = 0.02, 0.00005
_SLOW_S, _SLOW_PAUSE_S = 1.0, 0.0005
_IDLE_PAUSE_S = 0.002  # 1% of a core
_UNTIL_WOKEN = -1.0

_START_TIMEOUT_S = 30.0  # also to register memory, which a network card may want pinned
_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 5.0


@dataclass(eq=False, slots=True)
class _Call:
    function: Callable[[], Any]
    answer: asyncio.Future[Any]


@dataclass(eq=False, slots=True)
class _Write:
    peer: str
    handle: Any
    answer: asyncio.Future[None]


class NixlAgent:
    """A NIXL agent with one backend, for use from one event loop.

    Args:
        name: unique among all agents that ever meet.
        parameters: of the backend, as NIXL takes them.
        on_message: gets the sender's name and what came with a write of it; called in the loop.
    """

    def __init__(
        self, name: str, *, backend: str, parameters: Mapping[str, str], on_message: Callable[[str, bytes], None]
    ) -> None:
        self.name = name
        self._backend = backend
        self._parameters = dict(parameters)
        self._on_message = on_message
        self._jobs: deque[_Call | None] = deque()
        # Held by the thread; released to wake it. Not a SimpleQueue for both: in CPython 3.11 its `get` waits for ever
        # when the timeout is over before it begins to wait, as 50 us are when the thread loses its core just then.
        # Nor a Queue: its waiting costs more than looking at NIXL does.
        self._wake = threading.Lock()
        self._wake.acquire()
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None
        self._stopped = asyncio.Event()
        self._hung = False
        # The rest belongs to the thread.
        self._agent: Any = None
        self._remote_disconnect: type[Exception] = Exception
        self._registered: list[Any] = []
        self._writes: list[_Write] = []
        self._stuck: list[Any] = []
        self._happened_at = 0.0
        # Written by the loop, read by the thread (`_hung` above the other way round, too).
        self._expected = 0
        self._urgent = 0

    async def start(self) -> None:
        """Make the agent.

        Raises:
            TransferError: `transport_unavailable`.
        """
        self._thread = threading.Thread(target=self._run, name="slipstream-nixl", daemon=True)
        self._thread.start()
        try:
            await self.call(self._create, _START_TIMEOUT_S)
        except TransferError:
            await self.stop()
            raise

    async def register(self, runs: Sequence[Run]) -> Any:
        """Make host memory known to the backend; returns NIXL's descriptors of it."""
        return await self.call(lambda: self._register(runs), _START_TIMEOUT_S)

    async def metadata(self, registered: Any) -> bytes:
        """What a peer's agent needs to write to this registered memory, and to no other."""
        return await self.call(
            lambda: bytes(
                self._agent.get_partial_agent_metadata(registered, inc_conn_info=True, backends=[self._backend])
            )
        )

    def add_peer(self, metadata: bytes) -> None:
        """Make a peer's agent known; in the thread. The connection is made with the first write."""
        self._agent.add_remote_agent(metadata)

    async def remove_peer(self, name: str) -> None:
        """Forget a peer; writes to it that are under way are given up."""
        await self.call(lambda: self._remove_peer(name))

    async def probe(self, name: str) -> None:
        """Send a peer a message without a meaning, which fails when it is known to be gone."""
        await self.call(lambda: self._agent.send_notif(name, b"?"))

    async def drop_abandoned(self) -> None:
        """Give up the writes that nobody waits for any more."""
        await self.call(self._drop_abandoned)

    def write(self, peer: str, pieces: Sequence[Run], targets: Sequence[Run], message: bytes) -> asyncio.Future[None]:
        """Start a write of `pieces` (here) to `targets` (there), then send `message`.

        Returns:
            A future for the end: all is there, and the pieces may change. A write whose future is cancelled goes on.
        """
        answer: asyncio.Future[None] = self._loop.create_future()
        self._submit(_Call(lambda: self._post(peer, pieces, targets, message, answer), answer))
        return answer

    def expect(self, messages: int, *, urgent: int) -> None:
        """How many messages may come now; with none and no write under way the thread soon sleeps.

        Args:
            urgent: how many of them are being waited for.
        """
        wake = (not self._expected and messages > 0) or (not self._urgent and urgent > 0)
        self._expected, self._urgent = messages, urgent
        if wake:
            self._submit(_Call(_nothing, self._loop.create_future()))

    async def call(self, function: Callable[[], T], timeout_s: float = _CALL_TIMEOUT_S) -> T:
        """Run `function` in the thread.

        Raises:
            TransferError: `transport_unavailable`: it failed, or took longer than `timeout_s`.
        """
        answer: asyncio.Future[T] = self._loop.create_future()
        self._submit(_Call(function, answer))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            self._hung = True
            raise TransferError(_HUNG.format(backend=self._backend), code="transport_unavailable") from None

    async def stop(self) -> None:
        """End the thread and the agent; again is fine. A thread that hangs in NIXL is left to itself."""
        if self._thread is None:
            return
        self._put(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._stopped.wait()

    def _submit(self, job: _Call) -> None:
        if self._stopped.is_set() or self._thread is None:
            job.answer.set_exception(TransferError("the NIXL agent is closed", code="worker_gone"))
        elif self._hung:
            message = _HUNG.format(backend=self._backend)
            job.answer.set_exception(TransferError(message, code="transport_unavailable"))
        else:
            self._put(job)

    def _put(self, job: _Call | None) -> None:
        self._jobs.append(job)
        with contextlib.suppress(RuntimeError):  # it has been woken already
            self._wake.release()

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while True:
                if not self._jobs:
                    self._wake.acquire(timeout=self._pause_s())
                if self._jobs:
                    job = self._jobs.popleft()
                    if job is None:
                        break
                    self._perform(job)
                self._look()
        finally:
            self._destroy()
            self._tell(self._stopped.set)

    def _pause_s(self) -> float:
        quiet_s = time.monotonic() - self._happened_at
        if quiet_s < _BUSY_S:
            return _BUSY_PAUSE_S
        if quiet_s < _SLOW_S:
            # Also when all seems done: LIBFABRIC ends a write before its message has left, over `tcp`.
            return _SLOW_PAUSE_S if self._writes or self._urgent else _IDLE_PAUSE_S
        return _IDLE_PAUSE_S if self._writes or self._expected else _UNTIL_WOKEN

    def _perform(self, job: _Call) -> None:
        self._happened_at = time.monotonic()
        self._hung = False
        try:
            result = job.function()
        except Exception as error:  # whatever NIXL raises belongs to the caller
            self._fail(job.answer, self._translate(error))
        else:
            if not isinstance(result, _Pending):
                self._tell(_settle, job.answer, result)

    def _look(self) -> None:
        if self._writes:
            ended = [write for write in self._writes if self._ended(write)]
            if ended:
                self._happened_at = time.monotonic()
                self._writes = [write for write in self._writes if write not in ended]
        if self._agent is not None:
            for peer, messages in self._agent.get_new_notifs().items():
                self._happened_at = time.monotonic()
                for message in messages:
                    self._tell(self._on_message, _text(peer), message)

    def _ended(self, write: _Write) -> bool:
        try:
            state = self._agent.check_xfer_state(write.handle)
        except Exception as error:
            self._fail(write.answer, self._translate(error))
        else:
            if state == "PROC":
                return False
            self._finish(write.answer, state, write.peer)
        self._let_go(write.handle)
        return True

    def _post(
        self, peer: str, pieces: Sequence[Run], targets: Sequence[Run], message: bytes, answer: asyncio.Future[None]
    ) -> _Pending:
        agent = self._agent
        local = agent.get_xfer_descs([(run.address, run.length, 0) for run in pieces], "DRAM")
        remote = agent.get_xfer_descs([(run.address, run.length, 0) for run in targets], "DRAM")
        handle = agent.initialize_xfer("WRITE", local, remote, peer, message, [self._backend])
        try:
            state = agent.transfer(handle)
        except BaseException:
            self._let_go(handle)
            raise
        if state == "PROC":
            self._writes.append(_Write(peer, handle, answer))
        else:
            self._finish(answer, state, peer)
            self._let_go(handle)
        return _PENDING

    def _finish(self, answer: asyncio.Future[None], state: str, peer: str) -> None:
        if state == "DONE":
            self._tell(_settle, answer, None)
        else:
            self._fail(answer, TransferError(f"a write to {peer} failed in NIXL ({state})", code="worker_gone"))

    def _remove_peer(self, name: str) -> None:
        for write in [write for write in self._writes if write.peer == name]:
            self._fail(write.answer, TransferError(f"the connection to {name} was closed", code="worker_gone"))
            self._drop(write)
        self._agent.remove_remote_agent(name)

    def _drop_abandoned(self) -> None:
        for write in [write for write in self._writes if write.answer.done()]:
            self._drop(write)

    def _drop(self, write: _Write) -> None:
        self._writes.remove(write)
        self._let_go(write.handle)

    def _let_go(self, handle: Any) -> None:
        self._stuck.append(handle)
        still: list[Any] = []
        for each in self._stuck:
            try:
                self._agent.release_xfer_handle(each)
            except Exception:  # under way, and the backend cannot cancel it
                still.append(each)
        self._stuck = still

    def _create(self) -> None:
        try:
            api = _import_nixl()
        except ImportError as error:
            message = f"NIXL cannot be loaded ({error}); install slipstream[nixl]"
            raise TransferError(message, code="transport_unavailable") from None
        self._remote_disconnect = api.nixlBind.nixlRemoteDisconnectError
        agent = api.nixl_agent(self.name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        try:
            agent.create_backend(self._backend, self._parameters)
        except Exception as error:
            message = f"NIXL has no working {self._backend} backend here ({error}); {_REMEDY[self._backend]}"
            raise TransferError(message, code="transport_unavailable") from None
        self._agent = agent

    def _register(self, runs: Sequence[Run]) -> Any:
        registered = self._agent.register_memory(
            [(run.address, run.length, 0, "") for run in runs], "DRAM", [self._backend]
        )
        self._registered.append(registered)
        return registered

    def _destroy(self) -> None:
        closed = TransferError("the NIXL agent is closed", code="worker_gone")
        while self._jobs:
            if job := self._jobs.popleft():
                self._fail(job.answer, closed)
        for write in self._writes:
            self._fail(write.answer, closed)
            self._let_go(write.handle)
        self._writes.clear()
        for registered in self._registered:
            with contextlib.suppress(Exception):
                self._agent.deregister_memory(registered, [self._backend])
        self._registered.clear()
        self._stuck.clear()  # the last try is the agent's own
        self._agent = None

    def _translate(self, error: Exception) -> TransferError:
        if isinstance(error, TransferError):
            return error
        if self._agent is not None and isinstance(error, self._remote_disconnect):
            return TransferError("the peer's NIXL agent is gone", code="worker_gone")
        return TransferError(f"NIXL: {error or type(error).__name__}", code="transport_unavailable")

    def _fail(self, answer: asyncio.Future[Any], error: TransferError) -> None:
        self._tell(_refuse, answer, error)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, nobody listens
            self._loop.call_soon_threadsafe(function, *args)


_HUNG = (
    "a call into NIXL's {backend} backend does not return; nothing goes that way before it does. "
    "Restart the worker, or choose another transfer.transport"
)


class _Pending:
    """The answer comes later."""


_PENDING = _Pending()
_REMEDY = {
    "UCX": "see UCX_TLS and UCX_NET_DEVICES, or take transfer.transport=ucx",
    "LIBFABRIC": "it needs libfabric (2.0 or later), hwloc and the CUDA driver's libcuda; or take nixl_backend=UCX",
}


def _import_nixl() -> Any:
    """NIXL's Python side, without what importing it does to the process's logging."""
    # `nixl` chooses among its builds by importing torch: seconds, and needless where there is only one.
    builds = [name for name in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name) is not None]
    loud = logging.raiseExceptions
    try:
        api = importlib.import_module(f"{builds[0] if len(builds) == 1 else 'nixl'}._api")
    finally:
        logging.raiseExceptions = loud
    logger = logging.getLogger("nixl")  # it comes with a handler that writes to standard output
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return api


def _settle(answer: asyncio.Future[Any], result: object) -> None:
    if not answer.done():
        answer.set_result(result)


def _refuse(answer: asyncio.Future[Any], error: TransferError) -> None:
    if not answer.done():
        answer.set_exception(error)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _nothing() -> None:
    pass
