"""Where blocks lie, for the shapes in which engines keep their KV caches."""

import pytest
import torch

from kv_transfer import layout as layouts
from kv_transfer.layout import Layout, Region
from slipstream.errors import StartupError, TransferError


def a_layout(fingerprint: str = "same", blocks: int = 4, base: int = 0) -> Layout:
    regions = [Region(base, 16, 8), Region(base + 1000, 32, 32)]
    return Layout(fingerprint, blocks, 16, regions)


def block_bytes(cache: torch.Tensor, block: int) -> set[int]:
    """Addresses of all bytes of one block of a [blocks, ...] cache."""
    item = cache.element_size()
    flat = torch.arange(cache.untyped_storage().nbytes() // item).as_strided(cache.shape, cache.stride())
    start = cache.untyped_storage().data_ptr() + cache.storage_offset() * item
    return {start + int(i) * item + byte for i in flat[block].flatten() for byte in range(item)}


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(4, 2, 16, 8),
        torch.zeros(4, 16, 2, 8).permute(0, 2, 1, 3),
        torch.zeros(4, 2, 16, 8, dtype=torch.bfloat16),
        torch.zeros(3, 4, 2, 16, 8)[1],
    ],
    ids=["plain", "permuted", "half precision", "one layer of a joint allocation"],
)
def test_a_region_covers_exactly_the_bytes_of_each_block(cache: torch.Tensor) -> None:
    (region,) = layouts.regions_of(layouts.block_views({"layers.0": cache}, 4))
    for block in range(4):
        start = region.address + block * region.stride
        assert set(range(start, start + region.block_bytes)) == block_bytes(cache, block)


def test_keys_and_values_apart_are_two_regions() -> None:
    views = layouts.block_views({"layers.0": torch.zeros(2, 6, 16, 8)}, 6)
    assert [tuple(view.shape) for view in views] == [(6, 16 * 8 * 4)] * 2


def test_layers_come_in_numeric_order() -> None:
    caches = {f"model.layers.{i}.attn": torch.full((2, 4), float(i)) for i in (10, 9, 2)}
    first = [view.view(torch.float32)[0, 0].item() for view in layouts.block_views(caches, 2)]
    assert first == [2.0, 9.0, 10.0]


def test_blocks_with_gaps_and_unknown_shapes_are_refused_by_name() -> None:
    with pytest.raises(StartupError, match=r"layers\.3"):
        layouts.block_views({"layers.3": torch.zeros(4, 2, 16, 16)[..., :8]}, 4)
    with pytest.raises(StartupError, match="expected 5 blocks"):
        layouts.block_views({"layers.3": torch.zeros(4, 3, 16)}, 5)


def test_a_run_is_where_the_block_is() -> None:
    assert a_layout(base=5000).run(0, 3) == (5048, 8)
    assert a_layout(base=5000).run(1, 0) == (6000, 32)
    assert a_layout().block_bytes == 40


@pytest.mark.parametrize("block", [-1, 4, 1 << 40])
def test_a_block_that_does_not_exist_has_no_place(block: int) -> None:
    with pytest.raises(TransferError, match="no such KV block") as caught:
        a_layout().run(0, block)
    assert caught.value.code == "bad_message"


def test_fingerprints_depend_on_every_fact_and_not_on_their_order() -> None:
    facts = {"model": "a", "dtype": "float32"}
    assert layouts.fingerprint(facts) == layouts.fingerprint(dict(reversed(facts.items())))
    assert layouts.fingerprint(facts) != layouts.fingerprint({**facts, "dtype": "bfloat16"})
