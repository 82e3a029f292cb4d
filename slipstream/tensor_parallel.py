"""Which workers can exchange KV blocks, by how many tensor-parallel ranks each divides its KV heads among."""

from __future__ import annotations


def can_exchange(ranks: int, others: int) -> bool:
    """Whether a worker with so many ranks and one with so many others can hand blocks to each other."""
    fewer, more = sorted((ranks, others))
    return fewer > 0 and more % fewer == 0
