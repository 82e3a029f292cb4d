"""One child process, from its start to its very end, with all that it has started.

A child leads its own session, so a terminal's Ctrl-C does not reach it, and its process group is what it and its
own children are killed by. Its end is noticed by a pidfd, before it is reaped: until then its pid cannot be given
to another process, which makes it safe to kill the group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from slipstream.errors import StartupError

# What a process has started may end with it by itself, and clean up (multiprocessing's resource tracker removes the
# semaphores of a killed engine from /dev/shm), before it is killed.
_GROUP_GRACE_S = 1.0
# Longest the killed members of a process's group may take to be gone, and how often that is looked at.
_GROUP_TIMEOUT_S = 5.0
_GROUP_POLL_S = 0.02

_CHILD_SCRIPT = str(Path(__file__).with_name("child.py"))


@dataclass(frozen=True, slots=True)
class Component:
    """A process to run.

    Attributes:
        name: unique in the cluster, such as `prefill-0`.
        log_path: both its output streams are appended there.
        stop_stage: components of a lower stage have ended before those of a higher one are asked to.
        cpus: the CPUs it may use; empty for all.
        essential: the cluster cannot go on when this one cannot be kept running.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    log_path: Path
    stop_stage: int = 0
    cpus: tuple[int, ...] = ()
    essential: bool = False


class Process:
    """A running component. Make it with `spawn`, on the main thread (its life is bound to the thread's)."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._finishing: asyncio.Task[None] | None = None
        self._loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    def spawn(cls, component: Component) -> Process:
        """Start it.

        Raises:
            StartupError: the log cannot be written, or the system refuses another process.
        """
        cpus = ",".join(map(str, component.cpus)) or "-"
        wrapper = (sys.executable, "-I", "-S", _CHILD_SCRIPT, str(os.getpid()), cpus)
        try:
            with component.log_path.open("ab") as log:
                popen = subprocess.Popen(
                    (*wrapper, *component.argv),
                    env=dict(component.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise StartupError(f"cannot start {component.name}: {error}") from None
        return cls(popen)

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def wait(self) -> int:
        """Its return code once it has ended (negative: the signal). Nothing of its group is left then."""
        return await asyncio.shield(self._exit)

    def ask_to_end(self) -> None:
        """SIGTERM to the process alone; what it has started is its own to end."""
        if not self._exit.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to it and all of its group."""
        if not self._exit.done():
            self._kill_group()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._finishing = self._loop.create_task(self._finish())

    async def _finish(self) -> None:
        """End what is left of the group, then reap. SIGKILL takes a moment: an engine has memory to give back."""
        if not await self._group_gone(_GROUP_GRACE_S):
            self._kill_group()
            await self._group_gone(_GROUP_TIMEOUT_S)
        self._exit.set_result(self._popen.wait())

    async def _group_gone(self, limit_s: float) -> bool:
        for _ in range(round(limit_s / _GROUP_POLL_S)):
            if not _others_in_group(self.pid):
                return True
            await asyncio.sleep(_GROUP_POLL_S)
        return False

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _others_in_group(leader_pid: int) -> bool:
    """Whether anything but the leader still runs in its group; what is dead and only not yet reaped does not count."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            in_group = pid != leader_pid and os.getpgid(pid) == leader_pid
            if in_group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def describe_exit(returncode: int) -> str:
    """`ended with exit code 3`, `was killed by SIGSEGV`."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (was there enough memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def log_tail(path: Path, lines: int = 20, max_bytes: int = 16384) -> str:
    """The last lines of a log, empty when there is none."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - max_bytes))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
