"""One gRPC channel for each incarnation of a worker, kept open between requests.

A worker that is started again at its old address gets a new channel: the one before it still pauses after the attempts
that were refused, and fails calls meanwhile. A channel is closed when its worker has left the view and its last call
has ended: a worker that merely lost touch with the registry keeps its streams.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import grpc.aio

from slipstream.grpc_channels import client_options
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.registry_pb2 import WorkerRecord


class Place(NamedTuple):
    """Where an incarnation of a worker is."""

    address: str
    epoch: int

    @classmethod
    def of(cls, worker: WorkerRecord) -> Self:
        return cls(worker.address, worker.epoch)


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    calls: int = 0


class WorkerChannels:
    """Owns the channels; entered for as long as the frontend lives, closes all of them on exit.

    A dead or stopped peer fails its calls within the limits of `slipstream.grpc_channels.client_options`.
    """

    def __init__(self) -> None:
        self._entries: dict[Place, _Entry] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._entries:
            _, entry = self._entries.popitem()
            await entry.channel.close()

    def acquire(self, place: Place) -> grpc.aio.Channel:
        """The channel to a worker, for one call. Pair each with one `release`."""
        entry = self._entries.get(place)
        if entry is None:
            entry = _Entry(open_channel(place.address, peer=ComponentRole.WORKER, options=client_options()))
            self._entries[place] = entry
        entry.calls += 1
        return entry.channel

    def release(self, place: Place) -> None:
        """The call made on the channel has ended or was cancelled."""
        entry = self._entries.get(place)
        if entry is not None:  # None: everything was closed meanwhile
            entry.calls -= 1

    async def retain(self, places: AbstractSet[Place]) -> None:
        """Close the idle channels to places that are not among these; busy ones at a later call."""
        for place in [one for one, entry in self._entries.items() if one not in places and not entry.calls]:
            entry = self._entries.pop(place)
            await entry.channel.close()
