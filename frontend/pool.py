"""Several frontend processes on the same two ports, for machines with more cores than one event loop can use.

The kernel gives each connection to one of them (SO_REUSEPORT). This process, their parent, holds the ports, serves
nothing, starts a member anew when it has ended by itself, and passes on the request to stop. Members find each
other in a private folder: their counts (Prometheus' multiprocess mode), so that /metrics of any of them is of all, and
their sockets (`frontend.pool_peers`).

uvloop.run(supervise(settings))
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import multiprocess

from frontend.pool_processes import note_ended
from frontend.process import bound_socket, port_error, stop_signals
from slipstream import exposure, model_folder, telemetry
from slipstream.background import first_error
from slipstream.child_python import module_path
from slipstream.errors import StartupError
from slipstream.settings import FrontendSettings, Settings

log = telemetry.get_logger(__name__)

SETTINGS_FILE = "settings.json"
HANGUP = b"h"
"""Written to a member's standard input: read the files that are reread on SIGHUP."""
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Read by prometheus_client when it is imported, and by nothing else; set for members alone."""
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 15.0
# One that lived this long had started well: its end is no reason to wait with the next.
_STABLE_S = 30.0
# Ends within less than `_STABLE_S`, one after another, after which a member is not started again.
_MAX_QUICK_ENDS = 5
# On top of the members' own drain.
_STOP_GRACE_S = 5.0


async def supervise(settings: Settings) -> None:
    """Keep `frontend.workers` processes serving until SIGTERM or SIGINT; then each lets its open requests finish.

    Raises:
        StartupError: a port is taken, the model folder is not usable, or members keep ending at once.
    """
    exposure.check_faces(settings)
    with (
        stop_signals() as stop,
        held_ports(settings.frontend) as frontend,
        tempfile.TemporaryDirectory(prefix="slipstream-frontend-") as name,
    ):
        # Here already, so that what cannot work is said once, and a download is not made by all at once.
        await asyncio.to_thread(model_folder.resolve, settings.model, weights=False)
        folder = Path(name)
        members = settings.model_copy(update={"frontend": frontend})
        (folder / SETTINGS_FILE).write_text(members.model_dump_json())
        log.info(
            "frontend_pool", processes=frontend.workers, http_port=frontend.http_port, grpc_port=frontend.grpc_port
        )
        members_now: set[asyncio.subprocess.Process] = set()
        with _hangups_told(settings, members_now), first_error():
            async with asyncio.TaskGroup() as tasks:
                for index in range(frontend.workers):
                    kept = _keep(_Place(folder, index, members_now), stop, frontend.drain_timeout_s)
                    tasks.create_task(kept, name=f"frontend member {index}")


@contextlib.contextmanager
def held_ports(settings: FrontendSettings) -> Iterator[FrontendSettings]:
    """Both ports, found to be free and kept from others while the block runs; 0 has become a number.

    Raises:
        StartupError: one is taken.
    """
    with contextlib.ExitStack() as stack:
        ports = {}
        for name in ("http_port", "grpc_port"):
            ports[name] = _free_port(settings, name)
            one = settings.model_copy(update={"http_port": ports[name]})
            # Bound and never listening: no connection comes to it.
            stack.enter_context(bound_socket(one))
        yield settings.model_copy(update=ports)


def _free_port(settings: FrontendSettings, name: str) -> int:
    """The port of that name, if nobody has it: with SO_REUSEPORT two clusters would share it without a word."""
    host, port = settings.host, int(getattr(settings, name))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise port_error(name, host, port, error.strerror or str(error)) from error
        chosen: int = probe.getsockname()[1]
        return chosen


@dataclass(frozen=True, slots=True)
class _Place:
    """A member's place: its successors have the same.

    Attributes:
        members: those that run, in all places.
    """

    folder: Path
    index: int
    members: set[asyncio.subprocess.Process]


@contextlib.contextmanager
def _hangups_told(settings: Settings, members: set[asyncio.subprocess.Process]) -> Iterator[None]:
    """SIGHUP is passed on: through the members' standard input, since a member that has only begun would die of the
    signal itself."""
    if settings.security.keys_file is None:
        yield
        return

    def tell() -> None:
        for one in members:
            if one.stdin is not None and not one.stdin.is_closing():
                one.stdin.write(HANGUP)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, tell)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def _keep(place: _Place, stop: asyncio.Event, drain_timeout_s: float) -> None:
    """One member and its successors, until `stop` and its end.

    Raises:
        StartupError: they keep ending at once.
    """
    quick_ends = 0
    while not stop.is_set():
        began_s = asyncio.get_running_loop().time()
        code = await _run_member(place, stop, drain_timeout_s)
        if stop.is_set():
            return
        lived_s = asyncio.get_running_loop().time() - began_s
        quick_ends = 0 if lived_s >= _STABLE_S else quick_ends + 1
        log.error("frontend_process_died", code=code, lived_s=round(lived_s, 1))
        if quick_ends >= _MAX_QUICK_ENDS:
            raise StartupError(
                f"a frontend process ended {quick_ends} times within {_STABLE_S:g} s of its start (last with code "
                f"{code}); the log above says why"
            )
        pause_s = min(_FIRST_BACKOFF_S * 2.0**quick_ends, _MAX_BACKOFF_S) if quick_ends else 0.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await stop.wait()


async def _run_member(place: _Place, stop: asyncio.Event, drain_timeout_s: float) -> int:
    """One process from its start to its end: by itself, or because of `stop`; its exit code."""
    folder = place.folder
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "frontend.pool_member", str(place.index), str(folder)),
        stdin=asyncio.subprocess.PIPE,  # its end tells the member that this process is gone
        env=_environ(os.environ, folder),
    )
    place.members.add(process)
    stopping = asyncio.create_task(stop.wait(), name="stop")
    ended = asyncio.create_task(process.wait(), name="member ended")
    try:
        await asyncio.wait({stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            process.send_signal(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=drain_timeout_s + _STOP_GRACE_S)
    finally:
        place.members.discard(process)
        stopping.cancel()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        code = await ended
        # Its gauges are no more; what it has counted still counts.
        multiprocess.mark_process_dead(process.pid, str(folder))  # type: ignore[no-untyped-call]
        note_ended(folder, process.pid)
    return code


def _environ(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    return {**environ, "PYTHONPATH": module_path(environ), METRICS_VARIABLE: str(folder)}
