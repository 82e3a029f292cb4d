"""One-sided copies between two processes of one host (Linux `process_vm_readv`).

The reader copies straight out of the other process's memory: one copy, no system call on the other side,
nothing that spins while idle. The kernel allows it between processes of one user, unless a container's
seccomp profile, another PID namespace or `kernel.yama.ptrace_scope` forbids it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slipstream.errors import TransferError

_IOV_MAX = 1024
# Between two batches the caller can look at its deadline; 64 MiB take about 15 ms.
_BATCH_BYTES = 64 << 20
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


class Copy(NamedTuple):
    """`length` bytes from `source` (an address in the other process) to `target` (one in this process)."""

    source: int
    target: int
    length: int


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)  # a CDLL call releases the GIL
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)


def merge(copies: Sequence[Copy]) -> list[Copy]:
    """The same copies in fewer pieces: neighbours that are adjacent on both sides become one."""
    merged: list[Copy] = []
    for copy in sorted(copies):
        if merged:
            last = merged[-1]
            if last.source + last.length == copy.source and last.target + last.length == copy.target:
                merged[-1] = Copy(last.source, last.target, last.length + copy.length)
                continue
        merged.append(copy)
    return merged


def read_process(pid: int, copies: Sequence[Copy]) -> Iterator[int]:
    """Copy out of process `pid`; yields the bytes of each batch as it is done.

    Raises:
        TransferError: `worker_gone` (no such process or memory), `not_permitted` (the kernel forbids it).
    """
    for batch in _batches(copies):
        count = len(batch)
        local, remote = (_Iovec * count)(), (_Iovec * count)()
        for i, copy in enumerate(batch):
            local[i].base, local[i].length = copy.target, copy.length
            remote[i].base, remote[i].length = copy.source, copy.length
        wanted = sum(copy.length for copy in batch)
        done = _libc.process_vm_readv(pid, local, count, remote, count, 0)
        if done < 0:
            raise _failure(pid, ctypes.get_errno())
        if done != wanted:  # the kernel stops at the first piece whose memory is not there
            raise TransferError(f"read {done} of {wanted} bytes from process {pid}", code="worker_gone")
        yield done


def allow_readers() -> None:
    """Let other processes of this user read this one also under `ptrace_scope=1`; harmless elsewhere."""
    _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def _failure(pid: int, number: int) -> TransferError:
    forbidden = number in (errno.EPERM, errno.EACCES, errno.ENOSYS)
    code = "not_permitted" if forbidden else "worker_gone"  # ESRCH: it ended; EFAULT: not mapped (any more)
    return TransferError(f"cannot read the memory of process {pid}: {os.strerror(number)}", code=code)


def _batches(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    batch: list[Copy] = []
    size = 0
    for copy in copies:
        offset = 0
        while offset < copy.length:
            length = min(copy.length - offset, _BATCH_BYTES - size)
            batch.append(Copy(copy.source + offset, copy.target + offset, length))
            offset += length
            size += length
            if size >= _BATCH_BYTES or len(batch) == _IOV_MAX:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
