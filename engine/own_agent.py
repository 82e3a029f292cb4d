"""What a worker's service tells its own transfer agent, and asks of it.

The agent knows its service by the public key that came with its settings, and obeys nobody else: strangers can neither
add themselves to the registered workers nor have it connect anywhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TypeVar

from kv_transfer import wire
from kv_transfer.agent_start import Endpoint
from kv_transfer.door import dialed
from kv_transfer.identity import Identity
from slipstream.errors import TransferError
from slipstream.v1.registry_pb2 import TransferEndpoint, TransferPath

_ANSWER_S = 60.0
_NOTED_S = 5.0
_DIAL_S = 5.0
_SILENCE_S = 30.0

Answer = TypeVar("Answer", wire.ProbeResult, wire.Noted)


class OwnAgent:
    """The service's side. `key` is by which the agent knows it."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self.key = self._identity.public

    async def measure(self, own: Endpoint, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
        """The way from `peer` to this worker, as measured now; a way that does not work has an `error`.

        Raises:
            TransferError: this worker's own agent does not answer, or the peer's endpoint is none.
        """
        ask = wire.ProbePeer(peer.address, peer.epoch, peer.public_key, transport)
        answer = await self._ask(own, ask, wire.ProbeResult, _ANSWER_S)
        return TransferPath(
            peer_worker_id=worker_id,
            peer_epoch=peer.epoch,
            transport=answer.transport,
            detail=answer.detail,
            bytes_per_s=answer.bytes_per_s,
            latency_s=answer.latency_s,
            warning=answer.warning,
            error=answer.error,
            measured_unix_s=int(time.time()),
        )

    async def admit(self, own: Endpoint, keys: Iterable[bytes]) -> None:
        """These are the keys of the registered workers from now on.

        Raises:
            TransferError: this worker's own agent does not answer.
        """
        registered = wire.Registered(sorted(keys))
        for address in own.ranks or [own.address]:
            await self._ask(own, registered, wire.Noted, _NOTED_S, address)

    async def _ask(
        self, own: Endpoint, ask: wire.Message, kind: type[Answer], limit_s: float, address: str = ""
    ) -> Answer:
        try:
            async with (
                asyncio.timeout(limit_s),
                dialed(self._identity, address or own.address, own.key, _DIAL_S, _SILENCE_S) as line,
            ):
                line.post(ask)
                answer = await line.next()
        except TimeoutError as error:
            raise TransferError(f"the transfer agent gave no answer in {limit_s:g} s", code="timeout") from error
        if not isinstance(answer, kind):
            raise TransferError("the transfer agent is gone", code="worker_gone")
        return answer
