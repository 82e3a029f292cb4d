"""Workers that are ready in two seconds: processes forked from one that has imported the engine's libraries already.

Importing torch and vLLM takes ten seconds and more, in a worker's service and again in its engine. A test that kills
workers by the hundred cannot wait for that. The process that is forked is Python's own fork server: it has imported
`tests.support.warm_imports`, runs no threads and has used no gRPC. What is forked from it is the product's own code,
with its own settings, environment and log file.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_LOG_VARIABLE = "SLIPSTREAM_TEST_LOG"

_context = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Begin with the imports, in the background; the first `start` waits for them."""
    _context.set_forkserver_preload(["tests.support.warm_imports"])
    forkserver.ensure_running()


def share_fork_server() -> None:
    """Fork from the parent's fork server: Python 3.11 knows its address here, but would start another one."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = resource_tracker.ensure_running


def start(target: Callable[..., None], *args: Any, log: Path, environ: Mapping[str, str] | None = None) -> BaseProcess:
    """Run `target(*args)` in a new process, which ends when this one does; its output goes to `log`."""
    log.touch()
    process = _context.Process(target=_owned, args=(str(log), dict(environ or {}), target, args))
    process.start()
    return process


def _owned(log: str, environ: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(environ)
    os.environ[_LOG_VARIABLE] = log
    _write_to(log)
    share_fork_server()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="parent-watch", daemon=True).start()
    target(*args)


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
    target(**kwargs)


def check_forkable() -> None:
    """Called at the end of the imports: what is forked must not have threads, whose locks nobody would release."""
    running = len(os.listdir("/proc/self/task"))
    if running != 1:
        sys.stderr.write(f"warm_imports: {running} threads after the imports, forking may hang\n")
