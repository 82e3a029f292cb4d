"""What a cluster says of itself to global frontends: `GET /slipstream/v1/cluster`, with the peer key.

Times are the router's and the admission's own predictions, so that a cluster is chosen by what its frontend would do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

STATE_PATH = "/slipstream/v1/cluster"


class ModelState(msgspec.Struct, frozen=True):
    """One model.

    Attributes:
        ready_s: (tokens of a prompt of which nothing is cached, predicted seconds until its first token), by rising
            tokens; without the wait in the frontend's queue.
        wait_s: by priority class, predicted wait in the frontend's queue.
        room: by priority class, how many more may wait in the queue.
        ttft_p50_s, ttft_p95_s, itl_p50_s: seen within the last minute; 0 of nothing.
        bytes_per_token: of prompts as clients write them; 0 when nobody knows.
    """

    name: str
    max_model_len: int
    prefill_workers: int
    decode_workers: int
    created_unix_s: int
    ready_s: list[tuple[int, float]] = []
    wait_s: dict[str, float] = {}
    queued: dict[str, int] = {}
    room: dict[str, int] = {}
    ttft_p50_s: float = 0.0
    ttft_p95_s: float = 0.0
    itl_p50_s: float = 0.0
    bytes_per_token: float = 0.0


class ClusterState(msgspec.Struct, frozen=True):
    """One frontend's view of its cluster.

    Attributes:
        draining: it shuts down.
        took_s: what of the asker's wait was spent here, and not on the way.
        global_frontends: that have asked lately, the asker with them.
        prefixes: names of resident beginnings (`frontend.prefix_names.encoded`), unless the asker has this version.
    """

    frontend_id: str
    ready: bool
    draining: bool
    took_s: float
    global_frontends: int
    models: list[ModelState] = []
    prefixes_version: int = 0
    prefixes: str | None = None


TellsState = Callable[[str, str, int], Awaitable[bytes]]
"""The state as JSON, for a global frontend's key, its id, and the version of the prefixes that it has."""
