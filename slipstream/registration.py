"""Keeps one worker registered with the control plane, whatever happens to the control plane.

The whole record is sent each time: after a restart the control plane knows the worker again with the next
renewal, without asking. Load travels in the record, so that it is sent at least each second.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc.aio

from slipstream import telemetry
from slipstream.background import background
from slipstream.errors import InvalidRequestError, SlipstreamError
from slipstream.grpc_channels import client_options
from slipstream.grpc_errors import from_rpc_error
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.registry_pb2 import DeregisterRequest, RegisterRequest, WorkerRecord
from slipstream.v1.registry_pb2_grpc import RegistryStub

if TYPE_CHECKING:
    from slipstream.v1.registry_pb2_grpc import RegistryAsyncStub

log = telemetry.get_logger(__name__)

RENEW_AT_LEAST_EVERY_S = 1.0
CALL_TIMEOUT_S = 2.0
DEREGISTER_TIMEOUT_S = 1.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
RECONNECT_BACKOFF_S = 0.25


class Registration:
    """Registered while the context is entered; entering it does not wait for the control plane.

    On exit the worker takes its leave (at most `DEREGISTER_TIMEOUT_S`). No outage of the control plane is an
    error here: it is logged once when it begins and once when it ends.

    Args:
        registry_address: host:port of the control plane.
        record_provider: the worker's record as it is now; called for each renewal, at least each second, on the
            event loop. `renewals` is filled in here.
        on_first: called once, when the control plane has first taken the record.
    """

    def __init__(
        self,
        registry_address: str,
        record_provider: Callable[[], WorkerRecord],
        *,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        self._address = registry_address
        self._record_provider = record_provider
        self._changed = asyncio.Event()
        self._renewals = 0
        self._lease_s: float | None = None
        self._registered = False
        self._outage: str | None = None
        self._stack = AsyncExitStack()
        self._on_first: Callable[[], None] | None = on_first

    @property
    def registered(self) -> bool:
        """Whether the last attempt to register or renew succeeded."""
        return self._registered

    def push(self) -> None:
        """Send the record at once, because its state changed. Returns before it was sent."""
        self._changed.set()

    async def __aenter__(self) -> Self:
        channel = open_channel(
            self._address,
            peer=ComponentRole.CONTROL_PLANE,
            options=client_options(max_reconnect_backoff_s=RECONNECT_BACKOFF_S),
        )
        await self._stack.enter_async_context(channel)
        stub = RegistryStub(channel)
        self._stack.push_async_callback(self._deregister, stub)
        await self._stack.enter_async_context(background(self._keep_registered(stub), name="registration"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def _keep_registered(self, stub: RegistryAsyncStub) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            self._changed.clear()
            error = await self._register_once(stub)
            if error is None:
                self._note_success()
                backoff_s = FIRST_BACKOFF_S
                await self._wait_for_change(self._renew_every_s())
            else:
                self._note_failure(error)
                # A change pushed meanwhile goes with the next try: it must not turn the back-off into a storm.
                await asyncio.sleep(random.uniform(backoff_s / 2, backoff_s))
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S, self._renew_every_s() * 2)

    async def _register_once(self, stub: RegistryAsyncStub) -> SlipstreamError | None:
        record = WorkerRecord()
        record.CopyFrom(self._record_provider())
        self._renewals += 1
        record.renewals = self._renewals
        try:
            response = await stub.Register(RegisterRequest(worker=record), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        self._lease_s = response.lease_s
        return None

    async def _wait_for_change(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _renew_every_s(self) -> float:
        if self._lease_s is None:
            return RENEW_AT_LEAST_EVERY_S
        return min(self._lease_s / 3, RENEW_AT_LEAST_EVERY_S)

    def _note_success(self) -> None:
        if not self._registered:
            event = "registration_regained" if self._outage else "worker_registered"
            log.info(event, registry=self._address, lease_s=self._lease_s)
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        self._registered, self._outage = True, None

    def _note_failure(self, error: SlipstreamError) -> None:
        self._registered = False
        event = "registration_refused" if isinstance(error, InvalidRequestError) else "registration_lost"
        if self._outage != event:
            self._outage = event
            log.warning(event, registry=self._address, code=error.code, reason=error.message)

    async def _deregister(self, stub: RegistryAsyncStub) -> None:
        record = self._record_provider()
        request = DeregisterRequest(worker_id=record.worker_id, epoch=record.epoch)
        try:
            await stub.Deregister(request, timeout=DEREGISTER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # The lease will end by itself.
            log.warning("deregistration_failed", registry=self._address, reason=from_rpc_error(error).message)
