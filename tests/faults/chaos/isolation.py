"""A network, a shared memory and children of its own for a run, as far as this machine lets it have them.

In a network namespace packets can be dropped, and ports are nobody else's; with a /dev/shm of its own, whatever is left
there is this cluster's. Where that is not allowed the run goes on without, and leaves out what needs it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

_INSIDE = "SLIPSTREAM_CHAOS_ISOLATED"
_PR_SET_CHILD_SUBREAPER = 36
_SETUP = "mount -t tmpfs tmpfs /dev/shm && ip link set lo up && iptables -L INPUT -n"


def inside() -> bool:
    """Whether this process has them."""
    return os.environ.get(_INSIDE) == "1"


def enter() -> None:
    """Start this program again in them, if that works; else go on here."""
    if inside() or not possible():
        return
    os.environ[_INSIDE] = "1"
    os.execvp("unshare", _unshare(f'{_SETUP} >/dev/null && exec "$@"', "chaos", sys.executable, *sys.orig_argv[1:]))


def possible() -> bool:
    """Whether this machine lets us."""
    if not all(shutil.which(tool) for tool in ("unshare", "ip", "iptables", "mount")):
        return False
    return subprocess.run(_unshare(_SETUP), capture_output=True, timeout=30.0).returncode == 0


def _unshare(script: str, *more: str) -> list[str]:
    return ["unshare", "-r", "-n", "-m", "sh", "-c", script, *more]


def adopt_orphans() -> None:
    """Processes whose parents have ended become children of this one, where they are found."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
