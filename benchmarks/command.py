"""What every benchmark's command does around its measurement: words on stderr, a deadline, an orderly end."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console

from benchmarks.report import to_json
from slipstream.errors import SlipstreamError

Say = Callable[[str], None]
Result = TypeVar("Result")


def run(measure: Callable[[Path, Say], Awaitable[Result]], timeout_s: float) -> Result:
    """What `measure` returns, given a folder for logs and a way to tell how far it is. Everything that it started
    is stopped first, also on Ctrl-C and SIGTERM.

    Args:
        timeout_s: above what a whole run takes; past it something hangs that has no deadline of its own.

    Raises:
        typer.Exit: with 1 after an error, 143 after SIGTERM; the error has been printed.
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
        messages.print(f"error: not done within {timeout_s:g} s", style="red", markup=False)
        raise typer.Exit(1) from None
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


async def _run(measure: Callable[[Path, Say], Awaitable[Result]], say: Say, timeout_s: float) -> Result:
    this = asyncio.current_task()
    assert this is not None
    # Like Ctrl-C: everything that was started is stopped first.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    with tempfile.TemporaryDirectory(prefix="slipstream-benchmark-", ignore_cleanup_errors=True) as logs:
        async with asyncio.timeout(timeout_s):
            return await measure(Path(logs), say)


def show(result: Result, as_json: bool, print_tables: Callable[[Console, Result], None]) -> None:
    """The report on standard output, as JSON or as tables."""
    if as_json:
        sys.stdout.write(to_json(result) + "\n")
    else:
        print_tables(Console(width=None if sys.stdout.isatty() else 160, highlight=False), result)
