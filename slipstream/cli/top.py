"""`slipstream top`: the cluster live in a terminal, from the registry and the /metrics of frontends and workers."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from slipstream.cli.face_tls import api_key, http_address
from slipstream.cli.flags import CONTROL_PLANE, select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError, UnavailableError
from slipstream.security.names import ComponentRole

if TYPE_CHECKING:
    from slipstream.cli.top_figures import Figures, Look

PANEL = "Use a cluster"

_SCRAPES_AT_ONCE = 32
_SCRAPE_TIMEOUT_S = 2.0


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream top", "the cluster on this machine, every two seconds, until Ctrl-C"),
            ("slipstream top --control-plane 10.0.0.1:7600 --frontend http://10.0.0.1:8000", "another cluster"),
            ("slipstream top --once --json | jq .cluster.ttft_p99_s", "for programs"),
        ),
    )(top)


@with_settings(*select("api_key", *CONTROL_PLANE, "frontend.host", "frontend.http_port"))
def top(
    loaded: LoadedConfig,
    frontend: Annotated[
        list[str] | None,
        typer.Option("--frontend", metavar="URL", help="A frontend's HTTP address; again for each of several."),
    ] = None,
    interval_s: Annotated[float, typer.Option("--interval-s", help="Time between two looks.")] = 2.0,
    window_s: Annotated[float, typer.Option("--window-s", help="Time that rates and percentiles are of.")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="Look for one interval, print, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; without --once a line for each look.")] = False,
) -> None:
    """Show the cluster live: requests and tokens a second, TTFT and ITL, and a row for each worker."""
    if not 0.1 <= interval_s <= 3600:
        raise ConfigError(f"--interval-s = {interval_s:g} must be within 0.1 and 3600")
    urls = [_metrics_url(url) for url in frontend or [http_address(loaded.settings)]]
    key = api_key(loaded.settings)
    watched = _Watched(loaded.settings.control_plane.address, urls, interval_s, max(window_s, interval_s), key)
    try:
        asyncio.run(_show(watched, once=once, as_json=as_json))
    except KeyboardInterrupt:
        raise typer.Exit(130 if once else 0) from None


class _Watched:
    """A cluster that is looked at again and again.

    Args:
        urls: of the frontends' /metrics.
        key: that they want to see.
    """

    def __init__(
        self, registry: str, urls: list[str], interval_s: float, window_s: float, key: str | None = None
    ) -> None:
        from slipstream.registry_watch import RegistryView

        self.registry = registry
        self.interval_s = interval_s
        self._urls, self._key = urls, key
        self._window_s = window_s
        self._view = RegistryView()
        self._outage = ""
        self._heard_s = time.monotonic()
        self._changed = asyncio.Event()
        self._looks: deque[Look] = deque()

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow the registry while the block runs.

        Raises:
            UnavailableError: it was not heard of at all.
        """
        from slipstream.background import background
        from slipstream.registry_watch import follow
        from slipstream.v1.registry_pb2 import WorkerSet

        async def take(workers: WorkerSet) -> None:
            self._view.apply(workers)
            self._heard_s, self._outage = time.monotonic(), ""
            self._changed.set()

        def lost(reason: str) -> None:
            self._outage = reason
            self._changed.set()

        async with background(follow(self.registry, take=take, lost=lost), name="registry"):
            with suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    await self._changed.wait()
            if not self._view.known:
                raise UnavailableError(
                    f"no control plane answers at {self.registry} ({self._outage or 'silence'}); start a cluster with "
                    "`slipstream up`, or say where it is with --control-plane HOST:PORT"
                )
            yield

    async def look(self) -> Figures:
        """Look again; what is shown is measured from the oldest look of the window."""
        from slipstream.cli.top_figures import figures

        look = await self._look()
        self._looks.append(look)
        while len(self._looks) > 2 and look.at_s - self._looks[1].at_s >= self._window_s:
            self._looks.popleft()
        return figures(self._looks[0], look)

    async def _look(self) -> Look:
        from slipstream.cli.scrape import Page, fetch
        from slipstream.cli.top_figures import Look

        places = asyncio.Semaphore(_SCRAPES_AT_ONCE)
        problems = self._registry_problems()

        async def page(url: str) -> Page | None:
            async with places:
                try:
                    if url in self._urls:
                        return await fetch(url, _SCRAPE_TIMEOUT_S, key=self._key)
                    return await fetch(url, _SCRAPE_TIMEOUT_S, ComponentRole.WORKER)
                except UnavailableError as error:
                    problems.append(error.message)
                    return None

        records = self._view.records()
        urls = [*self._urls, *(record.metrics_url for record in records if record.metrics_url)]
        pages = dict(zip(urls, await asyncio.gather(*map(page, urls)), strict=True))
        answered = {url: one for url, one in pages.items() if one is not None}
        return Look(
            at_s=time.monotonic(),
            frontends={url: answered[url] for url in self._urls if url in answered},
            workers=records,
            pages={one.worker_id: answered[one.metrics_url] for one in records if one.metrics_url in answered},
            problems=tuple(problems),
        )

    def _registry_problems(self) -> list[str]:
        if not self._outage:
            return []
        age_s = time.monotonic() - self._heard_s
        return [f"control plane {self.registry} lost ({self._outage}); its view of the workers is {age_s:.0f} s old"]


async def _show(watched: _Watched, *, once: bool, as_json: bool) -> None:
    from rich.live import Live

    from slipstream.cli.terminal import output
    from slipstream.cli.top_page import page

    console = output()
    async with watched.following():
        shown = await watched.look()
        if once:
            await asyncio.sleep(watched.interval_s)
            shown = await watched.look()
        if once and not as_json:
            console.print(page(shown, watched.registry))
        elif as_json or not console.is_terminal:
            while True:
                print(json.dumps(asdict(shown), indent=2 if once else None), flush=True)  # noqa: T201
                if once:
                    return
                await asyncio.sleep(watched.interval_s)
                shown = await watched.look()
        else:
            with Live(console=console, auto_refresh=False, screen=True) as live, _resizes() as resized:
                while True:
                    live.update(page(shown, watched.registry, lines=console.height), refresh=True)
                    if await _passed(watched.interval_s, resized):
                        shown = await watched.look()


async def _passed(seconds: float, interrupted: asyncio.Event) -> bool:
    """Whether that time passed before the event."""
    try:
        async with asyncio.timeout(seconds):
            await interrupted.wait()
    except TimeoutError:
        return True
    interrupted.clear()
    return False


@contextmanager
def _resizes() -> Iterator[asyncio.Event]:
    """An event that is set whenever the terminal has another size."""
    loop, resized = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGWINCH, resized.set)
    try:
        yield resized
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


def _metrics_url(frontend: str) -> str:
    """Of `http://host:port` or `host:port`, with or without a path."""
    parts = urlsplit(frontend if "//" in frontend else f"http://{frontend}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--frontend = {frontend}: not an http address, as http://127.0.0.1:8000")
    return f"{parts.scheme}://{parts.netloc}/metrics"
