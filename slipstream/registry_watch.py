"""Following the registry: the loop that watches it through all its outages, and what is known of the workers meanwhile.

`RegistryView` is the pure part; `follow` is the loop that feeds it. The registry may be gone for as long as it likes:
the last view stays.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NoReturn

import grpc.aio

from slipstream.grpc_channels import CONNECT_TIMEOUT_S, client_options
from slipstream.grpc_errors import from_rpc_error
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.registry_pb2 import WatchRequest, WorkerRecord, WorkerSet
from slipstream.v1.registry_pb2_grpc import RegistryStub

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
RECONNECT_BACKOFF_S = 0.5


@dataclass(slots=True)
class RegistryView:
    """The workers that there are, as far as one process has heard."""

    known: bool = False  # whether any registry has ever been heard
    registry_id: str = ""
    settled: bool = False
    lease_s: float = 6.0
    _records: dict[str, WorkerRecord] = field(default_factory=dict)
    _listed: set[str] = field(default_factory=set)  # ids that this registry has listed since its start

    def apply(self, workers: WorkerSet) -> None:
        """Take a registry's set. Until the registry is settled, workers that it has not heard of yet are kept."""
        if workers.registry_id != self.registry_id:
            self._listed = set()
        listed = {record.worker_id: record for record in workers.workers}
        if not workers.settled:
            for worker_id, record in self._records.items():
                newer = worker_id in listed and listed[worker_id].epoch >= record.epoch
                if not newer and worker_id not in self._listed:
                    listed[worker_id] = record
        self._listed |= {record.worker_id for record in workers.workers}
        self._records = listed
        self.known, self.registry_id = True, workers.registry_id
        self.settled, self.lease_s = workers.settled, workers.lease_s

    def records(self) -> list[WorkerRecord]:
        """All workers in any state. Not copies: do not change them."""
        return list(self._records.values())


async def follow(
    registry_address: str,
    *,
    take: Callable[[WorkerSet], Awaitable[None]],
    lost: Callable[[str], None],
    identities: bool = False,
) -> NoReturn:
    """Watch the registry, and watch it again after every failure. Runs until cancelled.

    Args:
        take: awaited with each set.
        lost: called with the reason whenever a watch, or an attempt at one, has ended.
        identities: see `WatchRequest.identities`.
    """
    backoff_s = FIRST_BACKOFF_S

    async def taken(workers: WorkerSet) -> None:
        nonlocal backoff_s
        backoff_s = FIRST_BACKOFF_S
        await take(workers)

    request = WatchRequest(identities=identities)
    options = client_options(max_reconnect_backoff_s=RECONNECT_BACKOFF_S)
    async with open_channel(registry_address, peer=ComponentRole.CONTROL_PLANE, options=options) as channel:
        while True:
            try:
                reason = await _follow_one_watch(RegistryStub(channel).Watch(request), taken)
            except grpc.aio.AioRpcError as error:
                reason = from_rpc_error(error).message
            except TimeoutError:
                reason = "the registry fell silent"
            lost(reason)
            await asyncio.sleep(random.uniform(backoff_s / 2, backoff_s))
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)


async def _follow_one_watch(
    call: grpc.aio.UnaryStreamCall[WatchRequest, WorkerSet], take: Callable[[WorkerSet], Awaitable[None]]
) -> str:
    silence_s = CONNECT_TIMEOUT_S
    try:
        while True:
            async with asyncio.timeout(silence_s):
                workers = await call.read()
            if not isinstance(workers, WorkerSet):
                return "the registry ended the watch"
            await take(workers)
            # A set is due at least once a lease period.
            silence_s = 2 * workers.lease_s + 1
    finally:
        call.cancel()
