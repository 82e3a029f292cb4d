"""One-sided copies out of a real other process."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.transports.base import Run
from kv_transfer.transports.process_memory import read_process
from slipstream.errors import TransferError

SIZE = 1 << 20
PEER = """
import ctypes, sys
from kv_transfer.transports.process_memory import allow_readers
allow_readers()
data = (ctypes.c_ubyte * (1 << 20))(*(i * 7 % 251 for i in range(1 << 20)))
print(ctypes.addressof(data), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def peer() -> Iterator[tuple[int, int]]:
    """Another process and the address of a megabyte of known bytes in it."""
    with subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def expected(offset: int, length: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(offset, offset + length))


def test_bytes_arrive_as_they_are(peer: tuple[int, int]) -> None:
    pid, address = peer
    target = (ctypes.c_ubyte * 1000)()
    assert read_process(pid, [Run(address + 5, 1000)], [Run(ctypes.addressof(target), 1000)]) == 1000
    assert bytes(target) == expected(5, 1000)


def test_more_pieces_than_the_kernel_takes_at_once(peer: tuple[int, int]) -> None:
    pid, address = peer
    target = (ctypes.c_ubyte * 6000)()
    sources = [Run(address + 2 * i, 2) for i in range(3000)]
    assert read_process(pid, sources, [Run(ctypes.addressof(target) + 2 * i, 2) for i in range(3000)]) == 6000
    assert bytes(target) == expected(0, 6000)


@given(st.data())
def test_each_piece_goes_to_its_own_place(peer: tuple[int, int], data: st.DataObject) -> None:
    pid, address = peer
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=20))
    starts = data.draw(st.lists(st.integers(0, SIZE - 300), min_size=len(lengths), max_size=len(lengths)))
    target = (ctypes.c_ubyte * sum(lengths))()
    base = ctypes.addressof(target)
    targets = [Run(base + sum(lengths[:i]), length) for i, length in enumerate(lengths)]
    read_process(pid, [Run(address + start, run.length) for start, run in zip(starts, targets, strict=True)], targets)
    assert bytes(target) == b"".join(expected(*piece) for piece in zip(starts, lengths, strict=True))


def test_nothing_to_copy_is_no_error(peer: tuple[int, int]) -> None:
    assert read_process(peer[0], [], []) == 0


def test_pieces_of_unequal_length_are_refused(peer: tuple[int, int]) -> None:
    pid, address = peer
    target = (ctypes.c_ubyte * 8)()
    with pytest.raises(ValueError, match="differ"):
        read_process(pid, [Run(address, 16)], [Run(ctypes.addressof(target), 8)])


def test_a_process_that_is_gone_is_a_typed_error() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=30)
    target = ctypes.c_uint64()
    with pytest.raises(TransferError) as caught:
        read_process(gone.pid, [Run(4096, 8)], [Run(ctypes.addressof(target), 8)])
    assert caught.value.code == "worker_gone"


def test_memory_that_is_not_there_is_a_typed_error(peer: tuple[int, int]) -> None:
    pid, _ = peer
    target = ctypes.c_uint64()
    with pytest.raises(TransferError) as caught:
        read_process(pid, [Run(16, 8)], [Run(ctypes.addressof(target), 8)])
    assert caught.value.code == "worker_gone"
