"""Two hosts on one machine: two network namespaces joined by a veth pair, and a cable that can be slowed and cut.

    with TwoHosts() as hosts:
        hosts.near.run("ip", "addr")
        hosts.slow(mbit=100)
        hosts.cut()
        hosts.restore()

Each host has an address and a network device of its own, and nothing else: what one sends to the other goes over the
veth pair. A process that is started with `own_memory` has PIDs and a /dev/shm of its own, too, and so is on another
host in every respect that a worker can see.

Namespaces carry their owner's PID and start time in their names. Those of owners that are gone (a test run that was
killed) are removed, with all that runs in them, before new ones are made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

DEVICE = "wire0"
"""The network device of each host: its end of the cable."""

_PREFIX = "twohosts"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 20.0
_NEIGHBOURS = 2  # processes of `Host.submit`
# A process in PIDs of its own: number 1 there, and killed with its parent. Only it sees its /dev/shm.
_OWN_MEMORY = (
    *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"),
    *("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$0" "$@"'),
)

P = ParamSpec("P")
T = TypeVar("T")


@functools.cache
def why_not() -> str:
    """Why two hosts cannot be made here; empty when they can."""
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            return f"the program {program!r} is not installed (packages iproute2, util-linux)"
    trial = f"{_PREFIX}-trial-{os.getpid()}"
    try:
        _do("ip", "netns", "add", trial)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made, which takes root or CAP_NET_ADMIN and CAP_SYS_ADMIN: {error.stderr}"
    try:
        _do("ip", "-n", trial, "link", "add", DEVICE, "type", "veth", "peer", "name", "end")
    except subprocess.CalledProcessError as error:
        return f"this kernel makes no veth pairs: {error.stderr}"
    finally:
        _do("ip", "netns", "del", trial)
    return ""


class Host:
    """One end: a network namespace with one device.

    Attributes:
        name: of the network namespace.
        address: of its end of the cable.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._started: list[subprocess.Popen[bytes]] = []
        self._neighbours: ProcessPoolExecutor | None = None

    def start(self, argv: Sequence[str | Path], output: Path, *, own_memory: bool = False) -> subprocess.Popen[bytes]:
        """Start a command here; what it writes goes to `output`. It is killed with the host at the latest."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        # Also what decode could as well compute alone is handed over: that is what is tested.
        environ["SLIPSTREAM_FRONTEND__HANDOFF"] = "always"
        command = [*self._enter, *(_OWN_MEMORY if own_memory else ()), *(str(word) for word in argv)]
        with output.open("ab") as file:
            started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ)
        self._started.append(started)
        return started

    def run(self, *argv: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
        """Run a command here and return what it wrote.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        return _do(*self._enter, *argv, timeout_s=timeout_s)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function, which must be importable, in a process that is on this host."""
        if self._neighbours is None:
            spawning = multiprocessing.get_context("spawn")
            self._neighbours = ProcessPoolExecutor(
                _NEIGHBOURS, mp_context=spawning, initializer=_move_to, initargs=(self.name,)
            )
        return self._neighbours.submit(function, *args, **kwargs)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`submit`, and wait for what it returns."""
        return self.submit(function, *args, **kwargs).result(timeout=_COMMAND_TIMEOUT_S)

    def until_up(self) -> None:
        """Wait until the cable carries: the kernel says so a moment after both ends are up."""
        deadline = time.monotonic() + _COMMAND_TIMEOUT_S
        while "state UP" not in self.run("ip", "-o", "link", "show", "dev", DEVICE):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{DEVICE} of {self.name} does not come up")
            time.sleep(0.02)

    def sent_bytes(self) -> int:
        """Bytes that have left over the cable so far."""
        (link,) = json.loads(self.run("ip", "-s", "-j", "link", "show", "dev", DEVICE))
        return int(link["stats64"]["tx"]["bytes"])

    def tc(self, *words: str) -> None:
        """Replace the queue before the cable."""
        _do("tc", "-n", self.name, "qdisc", "replace", "dev", DEVICE, "root", *words)

    def free(self) -> None:
        """The queue before the cable is as it was made: without limits."""
        with contextlib.suppress(subprocess.CalledProcessError):  # there is no other queue
            _do("tc", "-n", self.name, "qdisc", "del", "dev", DEVICE, "root")

    def close(self) -> None:
        """End all processes here and remove the namespace."""
        if self._neighbours is not None:
            self._neighbours.shutdown(wait=False, cancel_futures=True)
        _remove(self.name)
        for started in self._started:
            started.wait(_COMMAND_TIMEOUT_S)

    @property
    def _enter(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)


class TwoHosts:
    """See the module's docstring.

    Attributes:
        near, far: the two ends.
    """

    def __init__(self) -> None:
        owner = f"{os.getpid()}-{_started_at(os.getpid())}"
        unique = f"{_PREFIX}-{owner}-{time.monotonic_ns() % 1_000_000}"
        self.near = Host(f"{unique}-near", "10.77.0.1")
        self.far = Host(f"{unique}-far", "10.77.0.2")

    def __enter__(self) -> Self:
        sweep()
        try:
            for host in self._both:
                _do("ip", "netns", "add", host.name)
            ends = (
                ("ip", "-n", self.near.name, "link", "add", DEVICE),
                ("peer", "name", DEVICE, "netns", self.far.name),
            )
            _do(*ends[0], "type", "veth", *ends[1])
            for host in self._both:
                _do("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", DEVICE)
                for device in ("lo", DEVICE):
                    _do("ip", "-n", host.name, "link", "set", device, "up")
            for host in self._both:
                host.until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def slow(self, *, mbit: float, delay_ms: float = 0.0, loss_percent: float = 0.0) -> str:
        """Let both directions carry no more than this. Returns what the kernel really does.

        Delay and loss need its module `netem`; without it the rate alone is limited, by `tbf`, which comes with a
        queue: what goes at full rate waits in it for up to 20 ms.
        """
        if _has_netem():
            words = ["netem", "rate", f"{mbit:g}mbit", "delay", f"{delay_ms:g}ms", "loss", f"{loss_percent:g}%"]
        else:
            words = ["tbf", "rate", f"{mbit:g}mbit", "burst", "32kb", "latency", "20ms"]
        for host in self._both:
            host.tc(*words)
        return " ".join(words)

    def cut(self, *, only_from: Host | None = None) -> None:
        """Nothing comes through any more, and nobody is told: a queue without places drops all it gets.

        Args:
            only_from: what this host sends; the other one is still heard.
        """
        for host in self._both if only_from is None else (only_from,):
            host.tc("pfifo", "limit", "0")

    def restore(self) -> None:
        """The cable is whole and fast."""
        for host in self._both:
            host.free()

    def close(self) -> None:
        """Remove both, with all that runs in them."""
        for host in self._both:
            host.close()

    @property
    def _both(self) -> tuple[Host, Host]:
        return self.near, self.far


def sweep() -> None:
    """Remove what owners that are gone have left behind."""
    if not _NAMESPACES.is_dir():
        return
    for path in _NAMESPACES.glob(f"{_PREFIX}-*-*-*-*"):
        pid, started_at = path.name.split("-")[1:3]
        if not (pid.isdecimal() and started_at.isdecimal() and _started_at(int(pid)) == int(started_at)):
            _remove(path.name)


def _remove(name: str) -> None:
    """Kill what runs in a namespace, then remove it; the cable goes with it."""
    if not (_NAMESPACES / name).exists():
        return
    deadline = time.monotonic() + _COMMAND_TIMEOUT_S
    while (pids := _do("ip", "netns", "pids", name).split()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    _do("ip", "netns", "del", name)


def _started_at(pid: int) -> int:
    """When the process with this id was started, in clock ticks since the boot; -1 when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(stat.rpartition(")")[2].split()[19])


@functools.cache
def _has_netem() -> bool:
    trial = f"{_PREFIX}-trial-{os.getpid()}"
    _do("ip", "netns", "add", trial)
    try:
        _do("tc", "-n", trial, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except subprocess.CalledProcessError:
        return False
    finally:
        _do("ip", "netns", "del", trial)
    return True


def _move_to(name: str) -> None:
    """Put this process into a network namespace; its threads, if it has any, stay where they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NAMESPACES / name).open("rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {name}")


def _do(*argv: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, argv, done.stdout, done.stderr.strip())
    return done.stdout
