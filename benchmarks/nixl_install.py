"""NIXL in a folder of its own, below the user's cache folder, for the vLLM servers that are compared with.

Not in the environment that runs this: Slipstream does not need it, and its half a gigabyte is for this comparison
only. A server gets it by PYTHONPATH, and with it the very vLLM, torch and numpy that everything else here runs on.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.processes import Component, Process, describe_exit, log_tail
from slipstream import model_folder
from slipstream.errors import UnavailableError

_LOCK = Path(__file__).with_name("nixl.lock")
_INSTALL_TIMEOUT_S = 240.0
_IMPORT_TIMEOUT_S = 60.0
_KILL_TIMEOUT_S = 10.0


async def installed(environ: Mapping[str, str], logs: Path) -> Path:
    """The folder to put on PYTHONPATH; NIXL is downloaded first when it is not here yet.

    Args:
        logs: where pip's words go.

    Raises:
        UnavailableError: it cannot be had on this machine; the message says why.
        StartupError: there is no cache folder.
    """
    folder = install_folder(environ)
    if not folder.exists():
        await _install(folder, environ, logs)
    # Made once, but run on whatever this machine is now: without its libraries every server would fail later.
    probe = (sys.executable, "-P", "-c", "import nixl._api, nixl._bindings")
    await _run("importing nixl", probe, with_path(environ, folder), logs / "nixl-import.log", _IMPORT_TIMEOUT_S)
    return folder


def install_folder(environ: Mapping[str, str]) -> Path:
    """Named after what the lock holds and the interpreter it is for, so that no change meets an older install."""
    digest = hashlib.sha256(_LOCK.read_bytes() + sys.implementation.cache_tag.encode()).hexdigest()[:12]
    return model_folder.models_cache(environ).parent / "benchmarks" / f"nixl-{digest}"


def with_path(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """`environ` with `folder` first on Python's path."""
    path = os.pathsep.join(filter(None, (str(folder), environ.get("PYTHONPATH"))))
    return {**environ, "PYTHONPATH": path}


async def _install(folder: Path, environ: Mapping[str, str], logs: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place: moving it there at the end is one step, so a folder of that name is always whole.
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UnavailableError(f"nixl cannot be installed below {folder.parent}: {error}") from None
    try:
        argv = (
            *(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"),
            *("--only-binary", ":all:", "--require-hashes", "--target", str(scratch), "-r", str(_LOCK)),
        )
        await _run("installing nixl", argv, environ, logs / "nixl-install.log", _INSTALL_TIMEOUT_S)
        _move(scratch, folder)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


def _move(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another run was faster, with the same
            raise UnavailableError(f"nixl cannot be moved to {folder}: {error}") from None


async def _run(what: str, argv: Sequence[str], environ: Mapping[str, str], log: Path, timeout_s: float) -> None:
    process = Process.spawn(Component(name=what, argv=tuple(argv), environ=environ, log_path=log))
    try:
        async with asyncio.timeout(timeout_s):
            code = await process.wait()
    except TimeoutError:
        raise UnavailableError(f"{what} took longer than {timeout_s:g} s; see {log}") from None
    finally:
        process.kill()
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            await process.wait()
    if code != 0:
        raise UnavailableError(f"{what} {describe_exit(code)}:\n{log_tail(log)}")
