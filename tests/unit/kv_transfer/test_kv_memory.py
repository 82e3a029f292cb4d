"""A KV cache as pieces of bytes."""

from __future__ import annotations

import pytest
import torch

from kv_transfer import layout as layouts
from kv_transfer.kv_memory import KvMemory, SendBuffer, Verbatim, address_of, tensor_of

BLOCKS = 6


@pytest.fixture
def memory() -> KvMemory:
    torch.manual_seed(1)
    caches = {
        "layers.0": torch.randn(BLOCKS, 2, 16, 8),
        "layers.1": torch.randn(2, BLOCKS, 16, 8),
    }
    memory = KvMemory(layouts.block_views(caches, BLOCKS), dtype="float32")
    memory.caches = caches  # type: ignore[attr-defined]  # kept alive
    return memory


def test_a_piece_is_the_bytes_of_its_block(memory: KvMemory) -> None:
    for region, view in enumerate(memory.views):
        for block in range(BLOCKS):
            assert bytes(memory.piece(region, block)) == view[block].numpy().tobytes()
            assert bytes(memory.tensor(region, block).numpy().tobytes()) == bytes(memory.piece(region, block))


def test_what_is_filled_in_is_in_the_cache_and_nowhere_else(memory: KvMemory) -> None:
    before = [view.clone() for view in memory.views]
    length = memory.piece_bytes[1]
    memory.fill(1, 3, memoryview(bytearray(range(256)) * (length // 256)))
    assert memory.views[1][3].tolist() == list(range(256)) * (length // 256)
    for region, view in enumerate(memory.views):
        for block in range(BLOCKS):
            assert (region, block) == (1, 3) or torch.equal(view[block], before[region][block])


def test_runs_say_where_pieces_are(memory: KvMemory) -> None:
    run = memory.run(2, 4)
    assert (run.address, run.length) == (memory.views[2][4].data_ptr(), memory.piece_bytes[2])
    assert address_of(memory.piece(2, 4)) == run.address
    holding = [whole for whole in memory.runs() if whole.address <= run.address < whole.address + whole.length]
    assert len(holding) == 1
    assert run.address + run.length <= holding[0].address + holding[0].length


def test_sizes_add_up(memory: KvMemory) -> None:
    assert memory.on_host
    assert memory.block_bytes == sum(memory.piece_bytes) == 2 * 16 * 8 * 4 * 2
    assert [block in memory for block in (-1, 0, BLOCKS - 1, BLOCKS)] == [False, True, True, False]


def test_bytes_travel_as_they_are(memory: KvMemory) -> None:
    pieces = [memory.tensor(0, 1), memory.tensor(2, 5)]
    buffer, codec = SendBuffer(4096), Verbatim()
    length = codec.encode(pieces, buffer.tensor)
    assert length == sum(codec.encoded_bytes(piece.numel()) for piece in pieces)
    targets = [torch.zeros_like(piece) for piece in pieces]
    codec.decode(tensor_of(buffer.view[:length]), targets)
    assert all(torch.equal(target, piece) for target, piece in zip(targets, pieces, strict=True))
    assert address_of(buffer.view) == buffer.run.address


def test_what_cannot_be_written_has_no_address() -> None:
    with pytest.raises(ValueError, match="read-only"):
        address_of(memoryview(b"fixed"))
