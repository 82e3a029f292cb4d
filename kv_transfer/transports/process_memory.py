"""One-sided copies between two processes of one host (Linux `process_vm_readv`).

The reader copies straight out of the other process's memory: one copy, no system call on the other side,
nothing that spins while idle. The kernel allows it between processes of one user, unless a container's
seccomp profile, another PID namespace or `kernel.yama.ptrace_scope` forbids it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections.abc import Sequence
from itertools import chain

from kv_transfer.transports.base import Run
from slipstream.errors import TransferError

_IOV_MAX = 1024
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


_libc = ctypes.CDLL(None, use_errno=True)  # a CDLL call releases the GIL
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)


def read_process(pid: int, sources: Sequence[Run], targets: Sequence[Run]) -> int:
    """Copy `sources` out of process `pid` to `targets` here, pairwise of equal length; returns the bytes copied.

    Raises:
        TransferError: `worker_gone` (no such process or memory), `not_permitted` (the kernel forbids it).
    """
    total = 0
    for first in range(0, len(sources), _IOV_MAX):
        total += _read(pid, sources[first : first + _IOV_MAX], targets[first : first + _IOV_MAX])
    return total


def _read(pid: int, sources: Sequence[Run], targets: Sequence[Run]) -> int:
    # A run is what the kernel calls an iovec: an address and a length, 8 bytes each.
    remote, local = array("Q", chain.from_iterable(sources)), array("Q", chain.from_iterable(targets))
    wanted = sum(remote[1::2])
    if remote[1::2] != local[1::2]:
        raise ValueError("sources and targets differ in their lengths")
    count = len(sources)
    done = _libc.process_vm_readv(pid, local.buffer_info()[0], count, remote.buffer_info()[0], count, 0)
    if done < 0:
        raise _failure(pid, ctypes.get_errno())
    if done != wanted:  # the kernel stops at the first piece whose memory is not there
        raise TransferError(f"read {done} of {wanted} bytes from process {pid}", code="worker_gone")
    return wanted


def allow_readers() -> None:
    """Let other processes of this user read this one also under `ptrace_scope=1`; harmless elsewhere."""
    _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def _failure(pid: int, number: int) -> TransferError:
    forbidden = number in (errno.EPERM, errno.EACCES, errno.ENOSYS)
    code = "not_permitted" if forbidden else "worker_gone"  # ESRCH: it ended; EFAULT: not mapped (any more)
    return TransferError(f"cannot read the memory of process {pid}: {os.strerror(number)}", code=code)
