"""Who has which KV heads where workers divide them among tensor-parallel ranks, and what two ranks have in common.

Rank r of n has the r-th n-th of the heads, one after the other; with more ranks than heads, each head is on several
ranks that follow one another. Of two workers, one's ranks divide the other's: so what a rank of the worker with more of
them (the finer one) has is a part of what one rank of the other (the coarser one) has, or all of it. Pure.
"""

from __future__ import annotations

from typing import NamedTuple

from slipstream.tensor_parallel import can_exchange


class Share(NamedTuple):
    """What two ranks of different workers have in common.

    Attributes:
        part, parts: which of how many equal parts of this rank's blocks it is.
        shard: a number for it that both know, and that no other share of the same handoff has.
        first: no rank before the other one has the same heads for this one.
    """

    part: int
    parts: int
    shard: int
    first: bool


def partners(rank: int, ranks: int, others: int) -> range:
    """The ranks of a worker with `others` ranks that have something in common with this one.

    Raises:
        ValueError: neither number divides the other.
    """
    if not can_exchange(ranks, others):
        raise ValueError(f"{ranks} and {others} tensor-parallel ranks: one must divide the other")
    if ranks >= others:
        partner = rank // (ranks // others)
        return range(partner, partner + 1)
    each = others // ranks
    return range(rank * each, (rank + 1) * each)


def share(rank: int, ranks: int, partner: int, others: int, heads: int) -> Share:
    """What rank `rank` of `ranks` has in common with `partner`, one of its partners of `others`.

    Args:
        heads: KV heads of the model, over all ranks.
    """
    if ranks >= others:
        return Share(0, 1, rank, first=True)
    each = others // ranks
    parts = max(1, min(others, heads) // ranks)
    copies = each // parts  # ranks of the finer worker that have the same heads
    within = partner - rank * each
    return Share(within // copies, parts, partner, first=within % copies == 0)
