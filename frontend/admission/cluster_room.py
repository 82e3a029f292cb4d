"""How much the cluster's workers take, summed from what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from frontend.admission.in_flight import ClusterRoom, Others
from frontend.router import Fleet
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
        frontends=max((one.load.frontends for one in ready), default=1) or 1,
    )


def others_of(fleet: Fleet, frontends: int) -> Others:
    """What other frontends do, as far as this one's router has heard: fresher than records, which are a second old."""
    for role in (Role.ROLE_PREFILL, Role.ROLE_DECODE):
        pools = [pool for (_, its), pool in fleet.pools.items() if its == role and len(pool)]
        if pools:
            return Others(frontends, sum(int(np.count_nonzero(pool.foreign_s)) for pool in pools))
    return Others(frontends)
