"""What every benchmark's command does around its measurement: words on stderr, a deadline, an orderly end."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console

from benchmarks.report import to_json
from slipstream.errors import SlipstreamError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Say = Callable[[str], None]
Result = TypeVar("Result")


def run(measure: Callable[[Path, Say], Awaitable[Result]], timeout_s: float) -> Result:
    """What `measure` returns, given a folder for logs and a way to tell how far it is. Everything that it started
    is stopped first, also when a signal asks for an end.

    Args:
        timeout_s: above what a whole run takes; past it something hangs that has no deadline of its own.

    Raises:
        typer.Exit: with 1 after an error, which has been printed; with 128 and its number after a signal.
    """
    messages = Console(stderr=True, highlight=False)
    began_s = time.monotonic()

    def say(what: str) -> None:
        messages.print(f"[dim]{time.monotonic() - began_s:6.1f} s[/]  {what}")

    try:
        return asyncio.run(_run(measure, say, timeout_s))
    except SlipstreamError as error:
        messages.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    except TimeoutError:
        messages.print(f"error: not done within {timeout_s:g} s; everything was stopped", style="red")
        raise typer.Exit(1) from None
    except _Stopped as stopped:
        raise typer.Exit(128 + stopped.signum) from None


async def _run(measure: Callable[[Path, Say], Awaitable[Result]], say: Say, timeout_s: float) -> Result:
    with tempfile.TemporaryDirectory(prefix="slipstream-benchmark-", ignore_cleanup_errors=True) as logs:
        async with _until_signalled(), asyncio.timeout(timeout_s):
            return await measure(Path(logs), say)


class _Stopped(Exception):  # noqa: N818 - not an error: somebody asked
    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@asynccontextmanager
async def _until_signalled() -> AsyncIterator[None]:
    """The block ends at the first signal that asks for it, after all that it has started; also in a shell's
    background, where Python itself would not listen to SIGINT.

    Raises:
        _Stopped: a signal came.
    """
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    received: list[int] = []

    def on_signal(signum: int) -> None:
        # Once: a second one would cut the stopping short and leave processes behind.
        if not received:
            received.append(signum)
            this.cancel()

    for signum in _STOP_SIGNALS:
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
        raise _Stopped(received[0]) from None
    finally:
        for signum in _STOP_SIGNALS:
            loop.remove_signal_handler(signum)


def show(result: Result, as_json: bool, print_tables: Callable[[Console, Result], None]) -> None:
    """The report on standard output, as JSON or as tables."""
    if as_json:
        sys.stdout.write(to_json(result) + "\n")
    else:
        print_tables(Console(width=None if sys.stdout.isatty() else 160, highlight=False), result)
