"""Runs in a child process before its command: binds its life to the launcher's and its threads to CPUs.

    python -I -S child.py PARENT_PID CPUS COMMAND [ARGUMENT]...       (CPUS: `0,1`, or `-` for all)

The command then takes this process over (exec), so its pid, its session and its parent stay the same. A script of
its own rather than Popen's `preexec_fn`, which is unsafe beside gRPC's threads. It imports nothing of ours, so that
it costs a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent_pid, cpus, command = int(arguments[0]), arguments[1], arguments[2:]
    # The kernel sends this when the parent ends in whatever way, kill -9 included. It outlives exec.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"cannot follow the launcher's death: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:
        sys.exit("the launcher has already ended")
    if cpus != "-":
        try:
            os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
        except OSError as error:  # a CPU went away meanwhile: slower, not wrong
            print(f"cannot stay on CPUs {cpus}: {error}", file=sys.stderr)  # noqa: T201
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
