"""What quantizing on the wire may change in a block, and what it may not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.compression import GROUP, Codec, codec_for
from slipstream.errors import StartupError, TransferError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("int8", "fp8")
# Rounding of the dtype that the answer is given in, relative to a number.
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-100, torch.bfloat16: 2.0**-100, torch.float16: 2.0**-24}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}
ROOT = Path(__file__).resolve().parents[3]


def a_codec(name: str, dtype: torch.dtype, group: int = GROUP) -> Codec:
    codec = codec_for(name, dtype, group)
    assert codec is not None
    return codec


def as_bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(torch.uint8)


def there_and_back(codec: Codec, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """The pieces as the other side has them."""
    raw = [as_bytes(piece) for piece in pieces]
    out = torch.empty(codec.encoded_bytes(sum(len(piece) for piece in raw)), dtype=torch.uint8)
    assert codec.encode(raw, out) == len(out)
    targets = [torch.full_like(piece, 0x55) for piece in raw]
    codec.decode(out, targets)
    return [target.view(piece.dtype) for target, piece in zip(targets, pieces, strict=True)]


def bound(name: str, dtype: torch.dtype, numbers: torch.Tensor, group: int) -> torch.Tensor:
    """The largest error allowed for each number: a formula of the number and its group's peak."""
    exact = numbers.double().view(-1, group)
    peak = exact.abs().amax(1, keepdim=True)
    if name == "int8":
        step = (peak / 254).expand_as(exact)
    else:
        step = torch.maximum(exact.abs() * 2.0**-4, peak / 448 * 2.0**-10)
    return (step + peak * 2.0**-20 + (exact.abs() + step) * ROUNDING[dtype] + SMALLEST[dtype]).view(-1)


@st.composite
def numbers(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    """Whole groups of 32 whose magnitudes lie anywhere in the dtype's range, with zeros, outliers and extremes."""
    groups = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    drawn = torch.randn(groups * 4, 32, generator=generator)
    low, high = (-14, 12) if dtype == torch.float16 else (-120, 110)
    exponents = torch.tensor(draw(st.lists(st.integers(low, high), min_size=groups * 4, max_size=groups * 4)))
    drawn *= 2.0 ** exponents.unsqueeze(1)
    for place in draw(st.lists(st.integers(0, drawn.numel() - 1), max_size=4)):
        drawn.view(-1)[place] = draw(st.sampled_from([0.0, LARGEST[dtype], -LARGEST[dtype], 1e-40, -1.0]))
    return drawn.view(-1).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), group=st.sampled_from([32, 64, 128]))
def test_each_number_comes_back_within_the_bound_of_its_group(
    name: str, dtype: torch.dtype, data: st.DataObject, group: int
) -> None:
    sent = data.draw(numbers(dtype))

    (came,) = there_and_back(a_codec(name, dtype, group), [sent])

    error = (came.double() - sent.double()).abs()
    assert torch.isfinite(came).all()
    assert (error <= bound(name, dtype, sent, group)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_come_back_as_zeros_beside_numbers_and_alone(name: str, dtype: torch.dtype) -> None:
    sent = torch.zeros(4 * GROUP, dtype=dtype)
    sent[:GROUP:2] = torch.linspace(-3, 3, GROUP // 2)

    (came,) = there_and_back(a_codec(name, dtype), [sent])

    assert torch.equal(came[sent == 0], sent[sent == 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_not_finite_becomes_nan_and_leaves_every_other_number_as_it_would_be(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    clean = data.draw(numbers(dtype))
    places = data.draw(st.lists(st.integers(0, len(clean) - 1), min_size=1, max_size=GROUP, unique=True))
    garbage = torch.tensor(data.draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf]), min_size=1)))
    clean[places] = 0
    dirty = clean.clone()
    dirty[places] = garbage[torch.arange(len(places)) % len(garbage)].to(dtype)
    codec = a_codec(name, dtype)

    (expected,), (came,) = there_and_back(codec, [clean]), there_and_back(codec, [dirty])

    assert came[places].isnan().all()
    expected[places], came[places] = 0, 0
    assert torch.equal(came, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_with_nothing_finite_is_nan_alone(name: str) -> None:
    for dtype in DTYPES:
        sent = torch.ones(3 * GROUP, dtype=dtype)
        sent[GROUP : 2 * GROUP] = torch.inf

        (came,) = there_and_back(a_codec(name, dtype), [sent])

        assert came.isnan().tolist() == [False] * GROUP + [True] * GROUP + [False] * GROUP


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 3, 100, 509, 510, 511, 1100]), max_size=6), seed=st.integers(0, 2**32))
def test_how_the_numbers_are_cut_into_pieces_changes_nothing(
    name: str, dtype: torch.dtype, sizes: list[int], seed: int
) -> None:
    lengths = [size * GROUP for size in sizes]
    sent = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed)).to(dtype)
    codec = a_codec(name, dtype)

    came = there_and_back(codec, list(sent.split(lengths)))

    (whole,) = there_and_back(codec, [sent])
    assert [len(piece) for piece in came] == lengths
    assert torch.equal(torch.cat([sent[:0], *came]), whole)


def test_blocks_go_to_their_places_in_a_cache_and_to_no_other() -> None:
    with torch.inference_mode():  # as vLLM makes them
        cache = torch.randn(6, 4 * GROUP).bfloat16()
    before, blocks = cache.clone(), cache.view(torch.uint8)
    codec = a_codec("int8", torch.bfloat16)
    out = torch.empty(codec.encoded_bytes(2 * blocks.shape[1]) + 7, dtype=torch.uint8)

    used = codec.encode([blocks[4], blocks[1]], out)
    codec.decode(out[:used], [blocks[0], blocks[5]])

    assert torch.equal(cache[1:5], before[1:5])
    for source, target in ((4, 0), (1, 5)):
        error = (cache[target].double() - before[source].double()).abs()
        assert (error <= bound("int8", torch.bfloat16, before[source], GROUP)).all()


def test_received_bytes_may_begin_anywhere() -> None:
    codec = a_codec("fp8", torch.float32)
    sent = torch.randn(2 * GROUP)
    landing = torch.zeros(1 + codec.encoded_bytes(sent.nbytes), dtype=torch.uint8)
    codec.encode([as_bytes(sent)], landing[1:])
    came = torch.empty_like(sent)

    codec.decode(landing[1:], [as_bytes(came)])

    assert torch.equal(came, there_and_back(codec, [sent])[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_decoding_bytes_that_nobody_encoded_does_not_fail(name: str, dtype: torch.dtype, seed: int) -> None:
    codec = a_codec(name, dtype)
    target = torch.zeros(8 * GROUP, dtype=dtype)
    size = codec.encoded_bytes(target.nbytes)
    received = torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

    codec.decode(received, [as_bytes(target)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.2656), (torch.bfloat16, 0.5156)], ids=str)
def test_the_encoded_size_depends_on_the_raw_size_alone(name: str, dtype: torch.dtype, share: float) -> None:
    codec = a_codec(name, dtype)
    block = 1000 * codec.group_bytes

    assert codec.encoded_bytes(block) / block == pytest.approx(share, abs=1e-4)
    assert codec.encoded_bytes(3 * block) == 3 * codec.encoded_bytes(block)
    assert codec.encoded_bytes(0) == 0


def test_sizes_that_cannot_be_are_refused_with_the_setting_to_change() -> None:
    codec = a_codec("int8", torch.bfloat16)
    good, odd = torch.zeros(128, dtype=torch.uint8), torch.zeros(192, dtype=torch.uint8)
    enough = torch.zeros(1024, dtype=torch.uint8)
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: codec.encoded_bytes(130), "raw_bytes: 130 bytes .* set transfer.compression=none"),
        # Two that are whole only together.
        (lambda: codec.encode([odd, odd[:64]], enough), "pieces: 192 bytes"),
        (lambda: codec.encode([enough[1:129]], enough), "pieces: .* byte 1, which is inside a number"),
        (lambda: codec.encode([good], torch.zeros(65, dtype=torch.uint8)), "out: 65 bytes, .* need 66"),
        (lambda: codec.decode(enough[:66], [odd]), "targets: 192 bytes"),
        (lambda: codec.decode(enough[:67], [good]), "data: 67 bytes, the targets need 66"),
    ]
    for attempt, message in attempts:
        with pytest.raises(TransferError, match=message) as caught:
            attempt()
        assert caught.value.code == "compression"


def test_no_compression_has_no_codec_and_other_caches_are_refused_at_the_start() -> None:
    assert codec_for("none", torch.uint8) is None
    with pytest.raises(StartupError, match=r"holds torch\.float8_e4m3fn.*set it to none"):
        codec_for("int8", torch.float8_e4m3fn)
    with pytest.raises(StartupError, match="'zip' is not one of none, int8, fp8"):
        codec_for("zip", torch.float32)


_COUNT_THREADS = """
import os, threading, torch
from kv_transfer.compression import codec_for

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
memory = torch.zeros(8 << 20, dtype=torch.uint8)

def work():
    before = threads()
    for name in ("int8", "fp8"):
        for dtype in (torch.float32, torch.bfloat16):
            codec = codec_for(name, dtype)
            memory.view(dtype)[:5] = float("nan")
            pieces = list(memory.split(1 << 20))
            out = torch.empty(codec.encoded_bytes(len(memory)), dtype=torch.uint8)
            codec.encode(pieces, out)
            codec.decode(out, pieces)
    quantizing = threads() - before
    memory.view(torch.float32).add_(1)
    print(quantizing, threads() - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.fixture
def counted_threads() -> tuple[int, int]:
    """Threads that appear in a process that gives torch four: for quantizing, and for one large operation."""
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    quantizing, large = done.stdout.split()
    return int(quantizing), int(large)


def test_a_transfer_thread_quantizes_alone_where_torch_would_start_a_team(counted_threads: tuple[int, int]) -> None:
    quantizing, large = counted_threads

    assert quantizing == 0
    assert large == 3
