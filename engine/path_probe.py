"""Asks this worker's own transfer agent to measure the way from another worker."""

from __future__ import annotations

import asyncio
import time

from kv_transfer import wire
from kv_transfer.channel import dial
from slipstream.errors import TransferError
from slipstream.v1.registry_pb2 import TransferEndpoint, TransferPath

_ANSWER_S = 60.0
_DIAL_S = 5.0


async def ask(own_address: str, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
    """The way from `peer` to this worker, as measured now; a way that does not work has an `error`.

    Raises:
        TransferError: this worker's own agent does not answer.
    """
    reader, writer = await dial(own_address, _DIAL_S)
    try:
        writer.write(wire.frame(wire.ProbePeer(peer.address, peer.epoch, transport)))
        async with asyncio.timeout(_ANSWER_S):
            answer = await wire.read(reader)
            while isinstance(answer, wire.Ping):
                answer = await wire.read(reader)
    except TimeoutError as error:
        raise TransferError(f"the transfer agent gave no answer in {_ANSWER_S:g} s", code="timeout") from error
    finally:
        writer.close()
    if not isinstance(answer, wire.ProbeResult):
        raise TransferError("the transfer agent is gone", code="worker_gone")
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
