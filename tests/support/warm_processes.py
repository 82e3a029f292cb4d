"""Workers that are ready in two seconds: processes forked from one that has imported the engine's libraries already.

Importing torch and vLLM takes ten seconds and more, in a worker's service and again in its engine. A test that kills
workers by the hundred cannot wait for that. The process that is forked is Python's own fork server: it has imported
`tests.support.warm_imports`, runs no threads and has used no gRPC. What is forked from it is the product's own code,
with its own settings, environment and log file.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

_LOG_VARIABLE = "TEST_OF_SLIPSTREAM_LOG"
FIRST_VARIABLE = "TEST_OF_SLIPSTREAM_FIRST"
"""Names functions, `module:function`, with commas between them, that a forked process and its engine call first."""
_END_GRACE_S = 1.0
_KILL_S = 10.0

_context = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Begin with the imports, in the background; the first `start` waits for them."""
    _context.set_forkserver_preload(["tests.support.warm_imports"])
    forkserver.ensure_running()


def server_address() -> str:
    """Where the fork server listens, for `join_fork_server` in a process that was not forked from it."""
    start_fork_server()
    server: Any = forkserver._forkserver
    return str(server._forkserver_address)


def join_fork_server(address: str) -> None:
    """Fork from the server of another process, which lives as long as that one does."""
    server: Any = forkserver._forkserver
    server._forkserver_address = address
    server._forkserver_alive_fd = os.pipe()[1]  # what is forked wants one to hold
    share_fork_server()


def share_fork_server() -> None:
    """Fork from the parent's fork server: Python 3.11 knows its address here, but would start another one."""
    server: Any = forkserver._forkserver
    server.ensure_running = resource_tracker.ensure_running


def start(target: Callable[..., None], *args: Any, log: Path, environ: Mapping[str, str] | None = None) -> BaseProcess:
    """Run `target(*args)` in a new process, which ends when this one does; its output goes to `log`."""
    log.touch()
    process = _context.Process(target=_owned, args=(str(log), dict(environ or {}), target, args))
    process.start()
    return process


def finish(process: BaseProcess, what: str, *, log: Path, limit_s: float) -> None:
    """Wait until it has done its work.

    Raises:
        AssertionError: it failed, or did not end in time and was killed.
    """
    process.join(limit_s)
    late = process.is_alive()
    if late:
        process.kill()
        process.join(_KILL_S)
    if late or process.exitcode != 0:
        how = f"did not end within {limit_s:g} s" if late else f"failed with {process.exitcode}"
        raise AssertionError(f"{what} {how}: {log.read_text(errors='replace')[-3000:]}")


def _owned(log: str, environ: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(environ)
    os.environ[_LOG_VARIABLE] = log
    _write_to(log)
    _begin(log)
    share_fork_server()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="parent-watch", daemon=True).start()
    target(*args)


def _begin(log: str) -> None:
    with _pids_file(Path(log)).open("a") as file:
        file.write(f"{os.getpid()} {psutil.Process().create_time()}\n")
    for name in os.environ.get(FIRST_VARIABLE, "").split(","):
        if name:
            pkgutil.resolve_name(name)()


def _pids_file(log: Path) -> Path:
    return log.with_suffix(".pids")


def forked_into(log: Path) -> list[psutil.Process]:
    """Those that were forked with this log and still run: a service, and its engine, which is no child of it."""
    file, found = _pids_file(log), list[psutil.Process]()
    for pid, created in (line.split() for line in (file.read_text().splitlines() if file.exists() else ())):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                found.append(process)
    return found


class Forked:
    """A forked process beside `deploy.processes.Process`: when it ends, what was forked with its log ends too."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        assert process.pid is not None
        self._process, self._log = process, log
        self.pid = process.pid
        self._ended = asyncio.Event()
        self._finishing: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(process.sentinel, self._on_end)

    async def wait(self) -> int:
        await self._ended.wait()
        return self._process.exitcode or 0

    def ask_to_end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._finishing = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await asyncio.to_thread(self._process.join, 10.0)
        left = await asyncio.to_thread(forked_into, self._log)
        _, late = await asyncio.to_thread(psutil.wait_procs, left, _END_GRACE_S)
        for process in late:
            process.kill()
        await asyncio.to_thread(psutil.wait_procs, late, _END_GRACE_S)
        self._ended.set()


def _write_to(log: str) -> None:
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


class EngineContext:
    """What vLLM gets for its `get_mp_context`: starts the engine core by forking too, as `spawn` would start it."""

    def __init__(self, context: ForkServerContext) -> None:
        self._context = context

    def Process(self, target: Callable[..., None], name: str, kwargs: Mapping[str, Any]) -> BaseProcess:  # noqa: N802
        environ = {key: value for key, value in os.environ.items() if key != _LOG_VARIABLE}
        log = os.environ.get(_LOG_VARIABLE, os.devnull)
        return self._context.Process(target=_engine_core, name=name, args=(log, environ, target, dict(kwargs)))

    def Queue(self) -> Any:  # noqa: N802
        return self._context.Queue()


def engine_context() -> EngineContext:
    return EngineContext(_context)


def _engine_core(log: str, environ: Mapping[str, str], target: Callable[..., None], kwargs: Mapping[str, Any]) -> None:
    os.environ.update(environ)
    _write_to(log)
    _begin(log)
    target(**kwargs)


def check_forkable() -> None:
    """Called at the end of the imports: what is forked must not have threads, whose locks nobody would release."""
    running = len(os.listdir("/proc/self/task"))
    if running != 1:
        sys.stderr.write(f"warm_imports: {running} threads after the imports, forking may hang\n")
