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
    """

    fingerprint: str
    blocks: int
    block_tokens: int
    regions: list[Region]
    rank: int = 0
    ranks: int = 1

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


def _bytes_of(name: str, cache: torch.Tensor) -> torch.Tensor:
    inner = sorted(range(1, cache.dim()), key=lambda dim: (cache.stride()[dim], cache.shape[dim]), reverse=True)
    dense = cache.permute(0, *inner)
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
