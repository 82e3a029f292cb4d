"""How much the cluster's workers take, summed from what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterable

from frontend.admission.in_flight import ClusterRoom
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState


def room_of(records: Iterable[WorkerRecord]) -> ClusterRoom:
    """Of the workers that take requests. A figure that one of them does not give is not known for all."""
    ready = [one for one in records if one.state == WorkerState.READY]
    decodes = [one for one in ready if one.role == Role.ROLE_DECODE]
    places = [one.capacity.max_running for one in decodes]
    kv_tokens = [one.capacity.blocks * one.capacity.block_tokens for one in decodes]
    return ClusterRoom(
        prefill_workers=len(ready) - len(decodes),
        decode_workers=len(decodes),
        places=sum(places) if all(places) else 0,
        kv_tokens=sum(kv_tokens) if all(kv_tokens) else 0,
        open_requests=sum(one.load.running + one.load.waiting for one in decodes),
        kv_tokens_used=sum(one.load.blocks_used * one.capacity.block_tokens for one in decodes),
    )
