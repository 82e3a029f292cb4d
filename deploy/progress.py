"""What a person sees while a cluster starts, runs and stops: a live table on a terminal, else a line a change."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from deploy.supervisor import State

_STYLES: dict[State, str] = {
    "ready": "green",
    "restarted": "yellow",
    "died": "bold red",
    "given up": "bold red",
    "sick": "bold red",
}


@dataclass
class _Row:
    state: State
    detail: str
    since_s: float
    ready_after_s: float | None = None


class Progress:
    """Keeps the state of every component and shows it. It is a `deploy.supervisor.Report`."""

    def __init__(self, console: Console, names: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._began_s = clock()
        self._rows = {name: _Row("starting", "", self._began_s) for name in names}
        self._reported: set[str] = set()
        self._live: Live | None = None

    def __call__(self, name: str, state: State, detail: str = "") -> None:
        row = self._rows.get(name)
        if row is not None:
            if name in self._reported and (row.state, row.detail) == (state, detail):
                return
            row.state, row.detail = state, detail
            if state == "ready" and row.ready_after_s is None:
                row.ready_after_s = self._clock() - self._began_s
        self._reported.add(name)
        shown_soon = state == "starting" and self._console.is_terminal  # in the table that is about to appear
        if self._live is None and not shown_soon and state != "stopped":
            self._print_line(name, state, detail)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show a table that updates itself, when there is a terminal to show it on; lines otherwise."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self._table, refresh_per_second=8) as self._live:
            try:
                yield
            finally:
                self._live.refresh()
        self._live = None

    def not_ready(self) -> list[str]:
        """The components that are not ready, each with its state."""
        return [f"{name} ({row.state})" for name, row in self._rows.items() if row.state != "ready"]

    def elapsed_s(self) -> float:
        return self._clock() - self._began_s

    def _print_line(self, name: str, state: State, detail: str) -> None:
        line = Text(f"[{self.elapsed_s():6.1f} s] {name}: ")
        line.append(state, style=_STYLES.get(state, "")).append(f": {detail}" if detail else "")
        # The terminal may be gone (SIGHUP), and a stop has to go on without it.
        with contextlib.suppress(OSError):
            self._console.print(line, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, row in list(self._rows.items()):
            done = row.ready_after_s is not None
            seconds = row.ready_after_s if row.ready_after_s is not None else self.elapsed_s()
            mark = Text("✓", style="green") if done else Text("✗", "red") if row.state == "died" else _SPINNER
            state = Text(": ".join(filter(None, (row.state, row.detail))), style=_STYLES.get(row.state, "cyan"))
            table.add_row(mark, name, state, Text(f"{seconds:.1f} s", style="dim"))
        return table


_SPINNER = Spinner("dots")
