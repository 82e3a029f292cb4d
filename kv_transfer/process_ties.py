"""What ties the processes of a worker together: none of them outlives the others, however they end.

The service owns the engine's process, and that owns a process for each tensor-parallel rank. An engine that has lost a
rank computes nothing any more; it ends at once, so that the service hears of it and the whole worker is started again.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Collection
from multiprocessing import connection

from slipstream import telemetry

log = telemetry.get_logger(__name__)

_REAPED_S = 1.0


def belong_to(owner_pid: int) -> None:
    """Tie this engine process to the one that owns it (the service, or the engine core of a rank): it ends when that
    has died, even by SIGKILL.

    A thread that sleeps in poll() on a pidfd: exact, and without cost. (PR_SET_PDEATHSIG would fire at the
    end of the thread, not of the process, that started this one.) A terminal's Ctrl-C is the service's to
    handle: it drains first.
    """
    if not owner_pid or owner_pid == os.getpid():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fd = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


def end_with(ranks: Collection[int]) -> None:
    """End this process when one of these children (by pid) is killed or fails. One that ends orderly is no reason."""
    children = [child for child in multiprocessing.active_children() if child.pid in ranks]

    def watch() -> None:
        left = list(children)
        while left:
            ended = set(connection.wait([child.sentinel for child in left]))
            for child in [child for child in left if child.sentinel in ended]:
                left.remove(child)
                until_s = time.monotonic() + _REAPED_S
                while child.exitcode is None and time.monotonic() < until_s:  # another thread may be the one to reap it
                    time.sleep(0.01)
                if child.exitcode != 0:
                    log.error("rank_died", name=child.name, exitcode=child.exitcode)
                    os._exit(1)

    threading.Thread(target=watch, name="rank-watch", daemon=True).start()
