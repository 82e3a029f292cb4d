"""One UCX worker, driven by the event loop of whoever uses it.

UCX does its work inside calls of its progress function. ucxx offers to call it from a thread that wakes up a
thousand times a second, or from asyncio tasks that never sleep. Here the loop watches UCX's event descriptor instead,
which is armed whenever nothing is left to do: an idle worker costs nothing. All of this runs in one thread.

What comes in is looked at before it is received (`tag_probe`): a message whose tag nobody claims goes to a bin. So
nothing piles up in UCX's queue of unexpected messages, and nothing has to be cancelled when a message never comes,
which UCX promises for no transport. Above 8 KiB a message is announced first and its bytes follow on request,
straight to where they were claimed for; so looking first costs no copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kv_transfer.transports.ucx_library import Library, load
from slipstream.errors import TransferError

# Longest stretch of progress before the loop's other work gets its turn.
_SLICE_S = 0.002
_CLOSE_TIMEOUT_S = 1.0

Done = Callable[[Exception | None], None]


@dataclass(frozen=True, slots=True)
class Claim:
    """Where a message goes (as many bytes as it has), and who wants to know when it is there."""

    place: memoryview
    done: Done


@dataclass(eq=False, slots=True)
class Endpoint:
    """The way to one peer. `failed` is called once, when UCX finds that it leads nowhere any more."""

    ucx: Any  # None once it was given back
    failed: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Running:
    done: Done
    memory: memoryview  # UCX works on it until the request has ended, whoever else has forgotten it


class UcxWorker:
    """Args:
    options: UCX's settings by name, without the `UCX_` in front.
    claim: says by tag and length where a message goes; None for one that is not wanted.
    most_bytes: longest message that is ever claimed.

    Raises:
        TransferError: `transport_unavailable`.
    """

    def __init__(
        self, options: Mapping[str, str], claim: Callable[[int, int], Claim | None], *, most_bytes: int
    ) -> None:
        self._library: Library = load()
        api = self._library.api
        try:
            self._context = api.UCXContext(dict(options), feature_flags=(api.Feature.TAG, api.Feature.WAKEUP))
            self._worker = api.UCXWorker(self._context)
        except self._library.error as error:
            raise TransferError(
                f"UCX cannot start: {error} (UCX_TLS, UCX_NET_DEVICES and transfer.host say what it may use)",
                code="transport_unavailable",
            ) from error
        self._event_fd = self._library.event_fd(self._worker.handle)
        self._claim = claim
        self._bin = memoryview(bytearray(most_bytes))
        self._any = (api.UCXXTag(0), api.UCXXTagMask(0))
        self._running: dict[Any, _Running] = {}
        self._endpoints: set[Endpoint] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn: asyncio.Handle | None = None

    @property
    def address(self) -> bytes:
        """What a peer needs in order to connect."""
        return bytes(self._worker.address)

    def start(self) -> None:
        """Let the running loop drive this worker from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._event_fd, self._progress)
        self._soon()

    def connect(self, address: bytes, failed: Callable[[str], None]) -> Endpoint:
        """The way to a peer; it is used, and found to lead nowhere, later.

        Raises:
            TransferError: `transport_unavailable`.
        """
        api = self._library.api
        try:
            ucx = self._worker.create_endpoint_from_worker_address(
                api.UCXAddress.create_from_buffer(address),
                True,  # errors of a peer are its own: without this UCX would end the process
            )
        except self._library.error as error:
            raise TransferError(
                f"UCX finds no way to the peer: {error} (UCX_TLS and UCX_NET_DEVICES say what it may use)",
                code="transport_unavailable",
            ) from error
        endpoint = Endpoint(ucx, failed)
        self._endpoints.add(endpoint)
        self._soon()
        return endpoint

    def lanes(self, endpoint: Endpoint) -> list[str]:
        """`transport/device` of what UCX uses for this endpoint."""
        return self._library.lanes(endpoint.ucx.handle)

    def send(self, endpoint: Endpoint, memory: memoryview, tag: int, done: Done) -> None:
        """Send `memory`, which must not change until `done` is called."""
        request = endpoint.ucx.tag_send(self._library.array(memory), self._library.api.UCXXTag(tag))
        self._running[request] = _Running(done, memory)
        self._soon()

    async def disconnect(self, endpoint: Endpoint) -> None:
        """Give the endpoint back; what is under way on it ends with an error. Again is fine.

        UCX holds on to what it has begun to send to a frozen peer until that goes on, or is found dead. It is not
        waited for.
        """
        ucx, endpoint.ucx = endpoint.ucx, None
        if ucx is None:
            return
        self._endpoints.discard(endpoint)
        if not ucx.alive:
            self._library.discard(ucx.handle)
            self._soon()
            return
        closed = asyncio.Event()
        self._running[ucx.close()] = _Running(lambda _: closed.set(), self._bin[:0])
        self._soon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await closed.wait()

    async def stop(self) -> None:
        """Give everything back. Nothing else may be called afterwards."""
        if self._loop is None:
            return
        for endpoint in list(self._endpoints):
            await self.disconnect(endpoint)
        self._loop.remove_reader(self._event_fd)
        if self._turn is not None:
            self._turn.cancel()
        self._loop = None
        self._running.clear()
        del self._worker, self._context

    def _soon(self) -> None:
        if self._turn is None and self._loop is not None:
            self._turn = self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        try:
            if not self._until_idle():
                self._soon()
        except self._library.error as error:
            # Unlikely, and nothing to go on with: an event that cannot be dealt with would come again at once.
            assert self._loop is not None
            self._loop.remove_reader(self._event_fd)
            for endpoint in list(self._endpoints):
                self._fail(endpoint, f"UCX has failed: {error}")

    def _until_idle(self) -> bool:
        """Work until there is nothing to do and the descriptor is armed; False when the time slice ended first."""
        until = time.monotonic() + _SLICE_S
        while True:
            while self._worker.progress_once():
                if time.monotonic() > until:
                    self._settle()
                    return False
            self._worker.progress()  # besides: what ucxx has put off, such as ending the requests of a failed endpoint
            if not self._settle() and self._worker.arm():
                return True
            if time.monotonic() > until:
                return False

    def _settle(self) -> bool:
        """Tell everybody what has come about. Whether that gave UCX something new to do."""
        took = False
        while (found := self._worker.tag_probe(*self._any)).matched:
            self._receive(found.sender_tag.value, found.length)
            took = True
        for request in [request for request in self._running if request.completed]:
            self._running.pop(request).done(self._error_of(request))
        for endpoint in [endpoint for endpoint in self._endpoints if not endpoint.ucx.alive]:
            self._fail(endpoint, "UCX has lost the peer")
        return took

    def _receive(self, tag: int, length: int) -> None:
        """Receive the message that was found first."""
        claim = self._claim(tag, length)
        memory = claim.place[:length] if claim is not None and length else self._bin
        if length > len(memory):
            # Nobody's, and longer than anything that was ever granted: into the bin, as far as it goes.
            request = self._worker.tag_recv(self._library.array(memory), self._library.api.UCXXTag(tag))
        else:
            message = self._worker.tag_probe(*self._any, True)
            request = self._worker.tag_recv_with_handle(self._library.array(memory), message)
        self._running[request] = _Running(claim.done if claim is not None else _ignore, memory)

    def _fail(self, endpoint: Endpoint, reason: str) -> None:
        self._endpoints.discard(endpoint)
        endpoint.failed(reason)

    def _error_of(self, request: Any) -> Exception | None:
        try:
            request.check_error()
        except self._library.error as error:
            return error
        return None


def _ignore(error: Exception | None) -> None:
    """Nobody waits for what goes to the bin."""
