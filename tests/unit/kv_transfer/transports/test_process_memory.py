"""One-sided copies out of a real other process."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.transports.process_memory import Copy, merge, read_process
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
    assert sum(read_process(pid, [Copy(address + 5, ctypes.addressof(target), 1000)])) == 1000
    assert bytes(target) == expected(5, 1000)


def test_more_pieces_than_the_kernel_takes_at_once(peer: tuple[int, int]) -> None:
    pid, address = peer
    target = (ctypes.c_ubyte * 6000)()
    copies = [Copy(address + 2 * i, ctypes.addressof(target) + 2 * i, 2) for i in range(3000)]
    assert sum(read_process(pid, copies)) == 6000
    assert bytes(target) == expected(0, 6000)


@given(st.data())
def test_merging_changes_the_number_of_pieces_and_nothing_else(peer: tuple[int, int], data: st.DataObject) -> None:
    pid, address = peer
    blocks = data.draw(st.permutations(range(16)))
    target = (ctypes.c_ubyte * (16 * 64))()
    base = ctypes.addressof(target)
    copies = [Copy(address + source * 64, base + at * 64, 64) for at, source in enumerate(blocks)]
    merged = merge(copies)
    assert sum(copy.length for copy in merged) == 16 * 64
    list(read_process(pid, merged))
    assert bytes(target) == b"".join(expected(source * 64, 64) for source in blocks)


def test_neighbours_become_one_piece() -> None:
    assert merge([Copy(64, 1064, 64), Copy(0, 1000, 64), Copy(128, 2000, 64)]) == [
        Copy(0, 1000, 128),
        Copy(128, 2000, 64),
    ]


def test_a_process_that_is_gone_is_a_typed_error() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=30)
    target = ctypes.c_uint64()
    with pytest.raises(TransferError) as caught:
        list(read_process(gone.pid, [Copy(4096, ctypes.addressof(target), 8)]))
    assert caught.value.code == "worker_gone"


def test_memory_that_is_not_there_is_a_typed_error(peer: tuple[int, int]) -> None:
    pid, _ = peer
    target = ctypes.c_uint64()
    with pytest.raises(TransferError) as caught:
        list(read_process(pid, [Copy(16, ctypes.addressof(target), 8)]))
    assert caught.value.code == "worker_gone"
