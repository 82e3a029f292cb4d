"""One gRPC channel for each worker address, kept open between requests.

A channel is closed when its worker has left the view and its last call has ended: a worker that merely lost
touch with the registry keeps its streams.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc.aio

from slipstream.grpc_channels import client_options
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    calls: int = 0


class WorkerChannels:
    """Owns the channels; entered for as long as the frontend lives, closes all of them on exit.

    A dead or stopped peer fails its calls within the limits of `slipstream.grpc_channels.client_options`.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._entries:
            _, entry = self._entries.popitem()
            await entry.channel.close()

    def acquire(self, address: str) -> grpc.aio.Channel:
        """The channel to a worker, for one call. Pair each with one `release`."""
        entry = self._entries.get(address)
        if entry is None:
            entry = _Entry(open_channel(address, peer=ComponentRole.WORKER, options=client_options()))
            self._entries[address] = entry
        entry.calls += 1
        return entry.channel

    def release(self, address: str) -> None:
        """The call made on the channel has ended or was cancelled."""
        entry = self._entries.get(address)
        if entry is not None:  # None: everything was closed meanwhile
            entry.calls -= 1

    async def retain(self, addresses: AbstractSet[str]) -> None:
        """Close the idle channels to addresses that are not among these; busy ones at a later call."""
        for address in [name for name, entry in self._entries.items() if name not in addresses and not entry.calls]:
            entry = self._entries.pop(address)
            await entry.channel.close()
