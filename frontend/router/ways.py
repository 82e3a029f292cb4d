"""The way of KV blocks between two candidates: whether there is one, and what of a transfer is felt."""

from __future__ import annotations

from frontend.router.candidate import Candidate, Way
from slipstream.tensor_parallel import can_exchange

NEAR = Way(bytes_per_s=1e9, latency_s=1e-3)
FAR = Way(bytes_per_s=100e6, latency_s=10e-3)
"""What a way that nobody has measured is taken for, within a host and between hosts."""


def way(receiver: Candidate, sender: Candidate) -> Way | None:
    """The best measured way, a typical one where nobody has measured; None when blocks cannot travel."""
    if not sender.reachable or not can_exchange(receiver.ranks, sender.ranks):
        return None
    near = receiver.host_id == sender.host_id and receiver.host_id != ""
    if not near and receiver.crossing.isdisjoint(sender.crossing):
        return None
    typical = NEAR if near else FAR
    measured = receiver.ways.get(sender.sender, typical) if receiver.ways else typical
    return measured if measured is None or measured.bytes_per_s > 0 else typical


def exposed_s(receiver: Candidate, the_way: Way, moved_tokens: int, prefill_s: float, factor: float) -> float:
    """Seconds of a transfer that come after the prompt's computation, which it runs beside.

    Blocks leave as they are computed: what is felt is the last one, and what the way is slower than the computation.
    """
    if moved_tokens <= 0:
        return 0.0
    block_s = receiver.block_bytes / the_way.bytes_per_s
    slower_s = block_s * (moved_tokens / receiver.block_tokens) - prefill_s
    return (the_way.latency_s + block_s + (slower_s if slower_s > 0 else 0.0)) * factor
