"""What a worker's process needs before it has an engine: its model, its board, and an end that waits for neither.

Reading a model and loading an engine take up to minutes, in which nothing hears a signal. They run in threads that hold
up nobody's end.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import psutil

from kv_transfer import board as boards
from kv_transfer.board import Board
from slipstream import telemetry
from slipstream.model_cache import local_model
from slipstream.model_check import check_model_files
from slipstream.model_folder import ModelFolder
from slipstream.settings import Settings

log = telemetry.get_logger(__name__)

T = TypeVar("T")

_SHM = Path("/dev/shm")


def checked_model(settings: Settings) -> ModelFolder:
    """The model's folder, on this machine from now on.

    Raises:
        StartupError: it cannot be found, or read as a model.
    """
    found = local_model(settings, os.environ)
    if settings.worker.engine == "vllm":
        check_model_files(found.path)
    return found


def in_daemon_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Its outcome. Unlike a thread of the event loop's executor, this one holds up nobody's end."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(cast("T", result))

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            failure = error
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="engine-load", daemon=True).start()
    return outcome


async def first_of(work: asyncio.Future[Any], *events: asyncio.Event, limit_s: float | None = None) -> bool:
    """Wait for the work, or one of these events, or the time. Whether the work is done; it is not cancelled."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait([work, *waits], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return work.done()


def end_despite_load(status: int) -> NoReturn:
    """End a process in which an engine still loads: neither its thread nor its processes can be asked to stop."""
    kill_children()
    os._exit(status)


def kill_children() -> None:
    """Also ranks that load, which do not notice that nobody waits for them. Only the tracker of shared memory is left,
    to remove what they have made."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.kill()


@contextmanager
def own_board(slots: int, *, epoch: int = 0, seed: bytes = b"", node: int = 0) -> Iterator[Board]:
    """The board of this worker, while the block runs; also sweeps boards of workers that were killed.

    Args:
        epoch, seed, node: of `Board.create`.
    """
    directory = _SHM if _SHM.is_dir() else Path(tempfile.gettempdir())
    for name in boards.remove_stale(directory):
        log.info("stale_board_removed", board=name)
    board = Board.create(directory, slots=slots, epoch=epoch, seed=seed, node=node)
    try:
        yield board
    finally:
        board.unlink()
