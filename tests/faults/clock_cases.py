"""A wall clock that jumps: forward, backward, and a worker that is started anew with a clock behind its own past.

Control plane, frontend and the service of a decode worker run with libfaketime (Debian's package of that name) in front
of the C library; the monotonic clock is left alone, as the kernel leaves it alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slipstream import config_file
from slipstream.child_python import module_path
from slipstream.settings import Settings
from tests.faults.arena import Arena
from tests.faults.case import Case, Measured, Promise, Stream
from tests.faults.load import Load, loading
from tests.faults.process_cases import BUSY_S, signalled
from tests.support import warm_processes
from tests.support.fault_cluster import Member

ENGINE_COMMAND = ("decode-worker",)
_PLAIN = "import runpy; runpy.run_module('slipstream', run_name='__main__')"
# libfaketime breaks `time.sleep` of a millisecond (it mistakes an absolute time of the monotonic clock for another),
# and vLLM's engine core lives by it: what a service starts has its clocks to itself.
_WITHOUT_ENGINE = f"import os; del os.environ['LD_PRELOAD']; {_PLAIN}"

STARTS_WITHIN_S = 600.0  # a process that imports everything anew
HOUR_S = 3600
HOLD_S = 8.0


def library() -> Path | None:
    """Where libfaketime is."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


def why_no_fake_clock() -> str:
    return "" if library() is not None else "libfaketime is not installed (Debian's package `libfaketime`)"


def run_faked(settings: Settings, command: Sequence[str], folder: str) -> None:
    """Become a command of the command line, whose wall clock is off by what `clock` in that folder says."""
    file = Path(folder, f"{'-'.join(command)}.yaml")
    config_file.write(settings, file)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    environ |= {
        "LD_PRELOAD": str(library()),
        "FAKETIME_TIMESTAMP_FILE": str(Path(folder, "clock")),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DISABLE_SHM": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": module_path(environ),
    }
    program = _WITHOUT_ENGINE if command == ENGINE_COMMAND else _PLAIN
    os.execve(sys.executable, [sys.executable, "-P", "-c", program, *command, "--config", str(file)], environ)


async def jump(arena: Arena) -> Measured:
    """Forward by an hour, backward by two, then the worker's end and a new start; see the module's docstring."""
    clock = arena.folder / "clock"
    member = arena.cluster.of("decode")[0]
    await asyncio.to_thread(clock.write_text, "+0s")
    try:
        await _end_all(arena, member)
        _start_faked(arena, member)
        await arena.whole(STARTS_WITHIN_S)
        async with loading([arena.target], arena.pool, Stream(), seed=9) as load:
            await _jump(arena, load, member, clock)
    finally:
        await _end_all(arena, member)
        await arena.whole(STARTS_WITHIN_S)
    return load.measured


async def _jump(arena: Arena, load: Load, member: Member, clock: Path) -> None:
    await load.until_streaming()
    for offset_s in (HOUR_S, -HOUR_S):
        await asyncio.to_thread(clock.write_text, f"{offset_s:+d}s")
        began_s = time.monotonic()
        while time.monotonic() - began_s < HOLD_S:
            if not await arena.all_known():
                load.measured.broken.append(f"a worker was forgotten when the clock jumped to {offset_s:+d} s")
                break
            await load.until_answered(1)
    signalled(member, signal.SIGTERM, "service")  # its next incarnation begins before the one that has left
    assert member.process is not None
    await asyncio.to_thread(member.process.join, BUSY_S)
    began_s = time.monotonic()
    _start_member(arena, member)
    await arena.whole(STARTS_WITHIN_S)
    load.measured.figures["back_after_s"] = round(time.monotonic() - began_s, 1)
    await load.until_answered(4)


async def _end_all(arena: Arena, member: Member) -> None:
    assert member.process is not None
    assert arena.frontend is not None
    assert arena.cluster.plane is not None
    member.signal(signal.SIGTERM, engine=False)
    for process in (arena.frontend, arena.cluster.plane):
        process.terminate()
    for process in (member.process, arena.frontend, arena.cluster.plane):
        await asyncio.to_thread(process.join, 2 * BUSY_S)


def _start_faked(arena: Arena, member: Member) -> None:
    cluster, folder = arena.cluster, str(arena.folder)
    cluster.plane = warm_processes.start(
        run_faked, cluster.settings, ("planner", "serve"), folder, log=cluster.plane_log
    )
    arena.frontend = warm_processes.start(
        run_faked, arena.frontend_settings, ("frontend",), folder, log=arena.frontend_log
    )
    _start_member(arena, member)


def _start_member(arena: Arena, member: Member) -> None:
    member.process = warm_processes.start(run_faked, member.settings, ENGINE_COMMAND, str(arena.folder), log=member.log)
    member.starts, member.record = member.starts + 1, None


CASES = (
    Case(
        "clock-jumps",
        "Clock jumps",
        f"the wall clock of control plane, frontend and a decode service: an hour forward, two backward {HOLD_S:g} s "
        "later; then that worker is started anew, with a clock behind its own past",
        Promise(
            "No lease, deadline or request ends by a wall clock; a worker whose clock went back is taken when its "
            "earlier registration has ended, a lease later at most.",
            silence_s=BUSY_S,
        ),
        alone=jump,
        why_not=why_no_fake_clock,
    ),
)
