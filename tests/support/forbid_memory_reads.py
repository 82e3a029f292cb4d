"""Makes the kernel forbid `process_vm_readv` to this process and its children, as a container's seccomp profile does.

    python -m tests.support.forbid_memory_reads COMMAND ...

runs a command that way. Linux on x86-64 and arm64; nothing can lift it again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PROCESS_VM_READV = {"x86_64": 310, "aarch64": 270}[platform.machine()]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid() -> None:
    """From now on `process_vm_readv` fails with EPERM here and in every child."""

    def instruction(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, value)

    bpf = b"".join(
        (
            instruction(0x20, 0, 0, 0),  # load the number of the system call
            instruction(0x15, 0, 1, _PROCESS_VM_READV),  # is it this one?
            instruction(0x06, 0, 0, _ERRNO | errno.EPERM),
            instruction(0x06, 0, 0, _ALLOW),
        )
    )
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(bpf) // 8, bpf)
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*call, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
