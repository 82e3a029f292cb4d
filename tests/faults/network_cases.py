"""A network that is slow, or cut in both directions or in one, between two hosts of a cluster.

On the near host: control plane, frontend, a decode worker and the clients; on the far one: the prefill worker and
another decode worker. So the cable lies between worker and worker, frontend and worker, and worker and control plane.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import msgspec

from tests.faults.arena import Arena
from tests.faults.case import Case, Measured, Promise, Stream
from tests.faults.load import HANG_S, Pair, loading
from tests.faults.process_cases import BUSY_S
from tests.support.two_host_cluster import DECODE, FAR_DECODE, GRPC_PORT, PREFILL, TwoHostCluster
from tests.support.two_hosts import TwoHosts, why_not

BEFORE_S, AFTER_S = 4.0, 15.0
WHOLE_WITHIN_S = 60.0
_WORKER_FLAGS = ("--transfer-silence-s", "1.5", "--transfer-timeout-s", "3", "--transfer-lease-s", "4")
_FRONTEND_FLAGS = ("--prefill-timeout-s", "5", "--first-token-timeout-s", "8", "--token-timeout-s", "6")
_HELD = ("slipstream_worker_kv_blocks_used", "slipstream_kv_handoffs_held", "slipstream_worker_requests_open")

Disturb = Callable[[TwoHosts], object]


def stream_for(target: str, pool: list[Pair], stream: Stream, for_s: float) -> bytes:
    """Runs on the near host: clients that stream for so long. Returns what was measured, as JSON."""

    async def run() -> Measured:
        async with loading([target], pool, stream, seed=5) as load:
            await asyncio.sleep(for_s)
        return load.measured

    return msgspec.json.encode(asyncio.run(run()))


async def disturb(arena: Arena, *, how: Disturb, hold_s: float) -> Measured:
    """Stream, disturb the cable for that time, restore it, and stream on until all is well again."""
    cluster = await asyncio.to_thread(_cluster, arena)
    hosts = cluster.hosts
    asking = hosts.near.submit(
        stream_for, f"{hosts.near.address}:{GRPC_PORT}", arena.pool, Stream(at_once=4), BEFORE_S + hold_s + AFTER_S
    )
    await asyncio.sleep(BEFORE_S)
    try:
        await asyncio.to_thread(how, hosts)
        await asyncio.sleep(hold_s)
    finally:
        await asyncio.to_thread(hosts.restore)
    restored_s = time.monotonic()
    raw = await asyncio.wait_for(asyncio.wrap_future(asking), BEFORE_S + hold_s + AFTER_S + HANG_S)
    measured = msgspec.json.decode(raw, type=Measured)
    while missing := await asyncio.to_thread(_missing, cluster):
        if time.monotonic() - restored_s > WHOLE_WITHIN_S:
            measured.broken.append(f"not whole again: {', '.join(missing)}")
            break
        await asyncio.sleep(0.5)
    return measured


def _cluster(arena: Arena) -> TwoHostCluster:
    found: TwoHostCluster | None = arena.shared.get("two hosts")
    if found is None:
        hosts = arena.lasting.enter_context(TwoHosts())
        found = arena.shared["two hosts"] = arena.lasting.enter_context(
            TwoHostCluster(
                hosts,
                arena.model,
                arena.folder / "two-hosts",
                *_WORKER_FLAGS,
                frontend_flags=_FRONTEND_FLAGS,
                own_memory=True,
                far_decode=True,
            )
        )
    return found


def _missing(cluster: TwoHostCluster) -> list[str]:
    """Workers that are not ready, or hold something although nobody asks."""
    ready = {one.worker_id for one in cluster.workers() if one.ready}
    missing = sorted({PREFILL, DECODE, FAR_DECODE} - ready)
    for name in sorted(ready):
        figures = cluster.metrics(name)
        missing += [f"{name}: {what} {figures[what]:g}" for what in _HELD if figures.get(what)]
    return missing


CUT = Promise(
    "Every answer is whole and right: what was beyond the cut goes on on this side of it, within the deadlines; what "
    "is beyond is used again when the cable is whole.",
    silence_s=2 * BUSY_S,
)

HOLD_S = 20.0
SLOW = Promise("Every answer is whole and right, later.", silence_s=2 * BUSY_S)


def cut(hosts: TwoHosts) -> None:
    hosts.cut()


def cut_to_far(hosts: TwoHosts) -> None:
    hosts.cut(only_from=hosts.near)


def cut_from_far(hosts: TwoHosts) -> None:
    hosts.cut(only_from=hosts.far)


def slow(hosts: TwoHosts) -> None:
    hosts.slow(mbit=1, delay_ms=50, loss_percent=1)


_WAYS: tuple[tuple[str, str, Disturb, Promise], ...] = (
    ("cut", "nothing comes through", cut, CUT),
    ("cut-to-far", "the far host hears nothing, and is heard", cut_to_far, CUT),
    ("cut-from-far", "the far host is not heard, and hears", cut_from_far, CUT),
    ("slow", "1 Mbit/s and, where the kernel can, 50 ms of delay and 1% loss", slow, SLOW),
)

CASES = tuple(
    Case(
        f"network-{name}",
        "Network",
        f"{words}, for {HOLD_S:g} s",
        promise,
        alone=partial(disturb, how=how, hold_s=HOLD_S),
        why_not=why_not,
    )
    for name, words, how, promise in _WAYS
)
