"""A worker's KV cache as the transfer agent sees it: pieces by region and block id, as bytes.

On a CPU a piece is read and written in place. In GPU memory bytes are not for the host to see: pieces go through a
`Codec` (see `compression`) into and out of host buffers, and transports never touch the cache itself.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from kv_transfer import layout as layouts
from kv_transfer.transports.base import Run

if TYPE_CHECKING:
    import torch


class Codec(Protocol):
    """Between pieces of the KV cache and bytes on the wire."""

    def encoded_bytes(self, raw_bytes: int) -> int: ...

    def encode(self, pieces: Sequence[torch.Tensor], out: torch.Tensor) -> int:
        """Write the pieces (1-D uint8) into `out` one after the other; returns the bytes written."""
        ...

    def decode(self, data: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """The reverse of `encode`."""
        ...


class Verbatim:
    """The bytes as they are, between host buffers and memory of any device."""

    def encoded_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, pieces: Sequence[torch.Tensor], out: torch.Tensor) -> int:
        offset = 0
        for piece in pieces:
            out[offset : offset + piece.numel()].copy_(piece)
            offset += piece.numel()
        return offset

    def decode(self, data: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        offset = 0
        for target in targets:
            target.copy_(data[offset : offset + target.numel()])
            offset += target.numel()


class KvMemory:
    """The blocks of one engine.

    Args:
        views: what `layout.block_views` returned: [blocks, block_bytes] bytes a region.
        dtype: name of the cache's number format, for compression.
    """

    def __init__(self, views: Sequence[torch.Tensor], *, dtype: str) -> None:
        self.views = list(views)
        self.dtype = dtype
        self._parts: dict[tuple[int, int], KvMemory] = {}
        self.regions = layouts.regions_of(views)
        self.blocks = views[0].shape[0] if views else 0
        self.on_host = all(view.device.type == "cpu" for view in views)
        self.piece_bytes = [region.block_bytes for region in self.regions]
        self.block_bytes = sum(self.piece_bytes)
        self._bytes = [_memory(region.address, self._extent(region)) for region in self.regions] if self.on_host else []

    def _extent(self, region: layouts.Region) -> int:
        return (self.blocks - 1) * region.stride + region.block_bytes

    def runs(self) -> list[Run]:
        """All of it, for transports that register what they send from; regions that overlap or touch are one run."""
        merged: list[Run] = []
        for region in sorted(self.regions, key=lambda region: region.address) if self.on_host else ():
            start, end = region.address, region.address + self._extent(region)
            if merged and start <= merged[-1].address + merged[-1].length:
                first = merged.pop()
                start, end = first.address, max(end, first.address + first.length)
            merged.append(Run(start, end - start))
        return merged

    def run(self, region: int, block_id: int) -> Run:
        where = self.regions[region]
        return Run(where.address + block_id * where.stride, where.block_bytes)

    def piece(self, region: int, block_id: int) -> memoryview:
        """The bytes of a piece, in place; on a host only."""
        where = self.regions[region]
        start = block_id * where.stride
        return self._bytes[region][start : start + where.block_bytes]

    def tensor(self, region: int, block_id: int) -> torch.Tensor:
        """The same as a 1-D tensor of bytes, on its device."""
        return self.views[region][block_id]

    def fill(self, region: int, block_id: int, data: memoryview) -> None:
        """Overwrite a piece; on a host only. Releases the GIL while it copies."""
        run = self.run(region, block_id)
        ctypes.memmove(run.address, address_of(data), run.length)

    def clear(self, region: int, block_id: int) -> None:
        """Zero a piece; on a host only. What did not fit its digest must not stay: attention multiplies the slots that
        are not written yet with weights of zero, and zero times a NaN is a NaN in the answer of whoever has the block
        next."""
        run = self.run(region, block_id)
        ctypes.memset(run.address, 0, run.length)

    def part(self, part: int, parts: int) -> KvMemory:
        """One of so many equal parts of each block, in the same memory."""
        if parts == 1:
            return self
        made = self._parts.get((part, parts))
        if made is None:
            sizes = [view.shape[1] // parts for view in self.views]
            views = [view[:, part * size : (part + 1) * size] for view, size in zip(self.views, sizes, strict=True)]
            made = self._parts[part, parts] = KvMemory(views, dtype=self.dtype)
        return made

    def __contains__(self, block_id: int) -> bool:
        return 0 <= block_id < self.blocks


class SendBuffer:
    """Host memory in which encoded pieces wait to be sent."""

    def __init__(self, length: int) -> None:
        import torch

        self._map = mmap.mmap(-1, length)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.view = memoryview(self._map)
        self.run = Run(self.tensor.data_ptr(), length)


def address_of(data: memoryview) -> int:
    """Where the bytes of a contiguous view are."""
    if data.readonly:
        raise ValueError("a read-only view has no address here")
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def tensor_of(data: memoryview) -> torch.Tensor:
    """The same bytes as a 1-D tensor."""
    import torch

    return torch.frombuffer(data, dtype=torch.uint8)


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
