"""Full disks: where logs go, where shared memory is, and where models are kept."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

from slipstream.settings import Settings
from slipstream.worker_settings import ModelCacheSettings
from tests.faults.arena import Arena
from tests.faults.case import Case, Measured, Promise, Stream
from tests.faults.load import Load, loading
from tests.faults.model_cases import start_and_expect_the_end
from tests.faults.process_cases import BUSY_S, signalled
from tests.support.fault_cluster import Member, run_decode

FULL = Path("/dev/full")  # a device that takes nothing: ENOSPC at every write
_CLONE_NEWNS = 0x00020000
_SMALL_BYTES = 64 << 10


def why_no_small_disk() -> str:
    """Why a small disk of our own cannot be made here."""
    for program in ("unshare", "mount"):
        if shutil.which(program) is None:
            return f"the program {program!r} is not installed"
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=20
    )
    return "" if done.returncode == 0 else "mounting a tmpfs takes root or CAP_SYS_ADMIN"


def run_decode_with_small(settings: Settings, folder: str) -> None:
    """A decode worker that finds a nearly full disk in that folder; nobody else does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, timeout=20)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SMALL_BYTES}", "tmpfs", folder], check=True, timeout=20)
    Path(folder, "filling").write_bytes(bytes(_SMALL_BYTES - 4096))
    run_decode(settings)


async def full_logs(arena: Arena) -> Measured:
    """A worker and the frontend run with full disks below their logs, from their start on."""
    member, before = arena.cluster.of("decode")[0], arena.frontend_settings
    logs, own_log = before.log.model_copy(update={"access_log": FULL, "requests": True}), member.log
    try:
        member.log, arena.frontend_log = FULL, FULL
        arena.frontend_settings = before.model_copy(update={"log": logs})
        await _restart(arena, member)
        async with loading([arena.target], arena.pool, Stream(), seed=3) as load:
            await load.until_answered(20)
        record = await member.status()
        load.measured.figures["answered_by_the_worker"] = record.load.requests_total if record is not None else 0
    finally:
        member.log, arena.frontend_log = own_log, arena.folder / "frontend.log"
        arena.frontend_settings = before
        await _restart(arena, member)
    return load.measured


async def _restart(arena: Arena, member: Member) -> None:
    """Both end, and are started anew with the settings and logs that they have now."""
    assert member.process is not None
    assert arena.frontend is not None
    signalled(member, signal.SIGTERM, "service")
    arena.frontend.terminate()
    for process in (member.process, arena.frontend):
        await asyncio.to_thread(process.join, 2 * BUSY_S)
    await arena.whole()


async def full_shared_memory(arena: Arena, load: Load) -> None:
    """A worker is started where /dev/shm is full."""
    await start_and_expect_the_end(
        arena,
        load,
        "disk-shm",
        lambda settings: settings,
        "cannot create the lease board in /dev/shm: No space left",
        target=partial(run_decode_with_small, folder="/dev/shm"),
    )


async def full_model_cache(arena: Arena, load: Load) -> None:
    """A worker is started whose cache of models has no room for its model."""
    folder = arena.folder / "small-cache"
    await asyncio.to_thread(os.makedirs, folder, exist_ok=True)
    cache = ModelCacheSettings(folder=folder)
    await start_and_expect_the_end(
        arena,
        load,
        "disk-model-cache",
        lambda settings: settings.model_copy(update={"model_cache": cache}),
        str(folder),
        target=partial(run_decode_with_small, folder=str(folder)),
    )


CASES = (
    Case(
        "disk-full-logs",
        "Full disk",
        "log of a decode worker, log and access log of both frontend processes: a device without room",
        Promise("Lines are lost, requests are not.", silence_s=BUSY_S),
        alone=full_logs,
    ),
    Case(
        "disk-full-shm",
        "Full disk",
        "a decode worker is started where /dev/shm has no room",
        Promise("It ends with an error that names the folder; the others serve on.", silence_s=BUSY_S),
        inflict=full_shared_memory,
        why_not=why_no_small_disk,
    ),
    Case(
        "disk-full-model-cache",
        "Full disk",
        "a decode worker is started whose model cache has no room",
        Promise("It ends with an error that names the folder; the others serve on.", silence_s=BUSY_S),
        inflict=full_model_cache,
        why_not=why_no_small_disk,
    ),
)
