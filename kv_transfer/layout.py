"""Where a worker's KV blocks lie in memory.

A worker's KV cache is a list of regions (one a layer, or two where K and V are apart). Block `i` is `block_bytes`
at `address + i * stride` of every region. What is inside a block is the engine's business (on CPU an
ISA-specific packing): two workers can exchange blocks when their fingerprints are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from kv_transfer import shards
from kv_transfer.shards import Share
from kv_transfer.transports.base import Run
from slipstream.errors import StartupError, TransferError

if TYPE_CHECKING:
    import torch


class Region(msgspec.Struct, frozen=True, array_like=True):
    """One layer's blocks; address and stride in bytes. The address is 0 where it cannot be read by others."""

    address: int
    stride: int
    block_bytes: int


class Layout(msgspec.Struct, frozen=True):
    """All of the KV memory of a worker, or of one of its tensor-parallel ranks, as its transfer agent tells peers.

    Attributes:
        fingerprint: equal when block contents can be exchanged.
        regions: their addresses are in the memory of the rank's process.
        rank, ranks: which part of the KV heads this is, and of how many.
        heads: KV heads of the model, over all ranks. by_head: a block has one head after the other, so that a part of
            it is some heads.
    """

    fingerprint: str
    blocks: int
    block_tokens: int
    regions: list[Region]
    rank: int = 0
    ranks: int = 1
    heads: int = 1
    by_head: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all regions."""
        return sum(region.block_bytes for region in self.regions)

    def run(self, region: int, block_id: int) -> Run:
        """Where a block is in one region.

        Raises:
            TransferError: `bad_message`: there is no such block.
        """
        if not 0 <= block_id < self.blocks:
            raise TransferError(f"no such KV block: {block_id} of {self.blocks}", code="bad_message")
        where = self.regions[region]
        return Run(where.address + block_id * where.stride, where.block_bytes)

    def partners(self, others: int) -> range:
        """Ranks of a worker with so many of them, with which this one has KV heads in common.

        Raises:
            TransferError: `layout`: they cannot exchange blocks.
        """
        try:
            return shards.partners(self.rank, self.ranks, others)
        except ValueError as error:
            raise TransferError(f"{error} (worker.tensor_parallel_size)", code="layout") from None

    def share(self, partner: int, others: int) -> Share:
        """What this rank has in common with a partner of its, as this one sees it."""
        return shards.share(self.rank, self.ranks, partner, others, self.heads)

    def seen_from(self, partner: int, others: int) -> Share:
        """The same as the partner sees it."""
        return shards.share(partner, others, self.rank, self.ranks, self.heads)

    def part(self, part: int, parts: int) -> Layout:
        """One of so many equal parts of each block."""
        if parts == 1:
            return self
        regions = [
            Region(region.address + part * (region.block_bytes // parts), region.stride, region.block_bytes // parts)
            for region in self.regions
        ]
        return msgspec.structs.replace(self, regions=regions)


def block_views(kv_caches: Mapping[str, torch.Tensor], blocks: int) -> list[torch.Tensor]:
    """The caches as byte tensors of shape [blocks, block_bytes] over the same memory, layers in numeric order.

    Raises:
        StartupError: a cache has a shape in which blocks cannot be told apart, or a block has gaps.
    """
    views: list[torch.Tensor] = []
    for name in in_order(kv_caches):
        cache = kv_caches[name]
        if cache.shape[0] == blocks:
            views.append(_bytes_of(name, cache))
        elif cache.dim() > 1 and cache.shape[1] == blocks:  # K and V apart: [2, blocks, ...]
            views.extend(_bytes_of(name, half) for half in cache.unbind(0))
        else:
            raise StartupError(f"KV cache {name} has shape {tuple(cache.shape)}; expected {blocks} blocks in front")
    return views


def by_head(kv_caches: Mapping[str, torch.Tensor], blocks: int, heads: int) -> bool:
    """Whether each block has one head after the other in memory.

    Args:
        heads: in these caches.
    """
    halves = [cache if cache.shape[0] == blocks else cache[0] for cache in kv_caches.values()]
    return heads == 1 or all(_by_head(cache, heads) for cache in halves)


def _by_head(cache: torch.Tensor, heads: int) -> bool:
    outermost = _inner(cache)[0]
    # A dimension of the same size could be taken for the heads. On CPUs they are always the one after the blocks.
    known = list(cache.shape[1:]).count(heads) == 1 or (cache.device.type == "cpu" and outermost == 1)
    return known and cache.shape[outermost] == heads


def _inner(cache: torch.Tensor) -> list[int]:
    """The dimensions of a block, in the order in which they lie in memory."""
    return sorted(range(1, cache.dim()), key=lambda dim: (cache.stride()[dim], cache.shape[dim]), reverse=True)


def _bytes_of(name: str, cache: torch.Tensor) -> torch.Tensor:
    dense = cache.permute(0, *_inner(cache))
    expected = 1
    for dim in range(dense.dim() - 1, 0, -1):
        if dense.shape[dim] != 1 and dense.stride(dim) != expected:
            raise StartupError(f"KV cache {name}: a block with strides {cache.stride()} is not one run of bytes")
        expected *= dense.shape[dim]
    return dense.as_strided((dense.shape[0], expected), (dense.stride(0), 1)).view(_byte_type())


def _byte_type() -> torch.dtype:
    import torch  # late: the layout of another process is read without it

    return torch.uint8


def regions_of(views: Sequence[torch.Tensor]) -> list[Region]:
    """Addresses and sizes of what `block_views` returned."""
    return [Region(view.data_ptr(), view.stride(0), view.shape[1]) for view in views]


def fingerprint(facts: Mapping[str, object]) -> str:
    """A digest of everything that must agree before blocks can be exchanged."""
    text = "\n".join(f"{key}={facts[key]}" for key in sorted(facts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def in_order(names: Iterable[str]) -> list[str]:
    """Layer names in numeric order: `model.layers.10.attn` after `model.layers.9.attn`."""
    return sorted(names, key=lambda name: ([int(part) for part in name.split(".") if part.isdigit()], name))
