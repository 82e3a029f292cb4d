"""`slipstream prefetch`: brings models to this machine's disk and memory before a worker asks for them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from slipstream.cli.flags import select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError

PANEL = "Roles, one process each"

_FLAGS = select("model", "model_cache.*", "log.*", own={"model_cache"}, without={"model"})


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What was done for one model."""

    model: str
    folder: str
    size_bytes: int
    fetched_bytes: int
    fetch_s: float
    evicted: tuple[str, ...]
    warmed_bytes: int
    warm_s: float
    not_warmed: str


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream prefetch org/name --folder /nvme/models", "from the hub to a local disk, and into memory"),
            (
                "slipstream prefetch /shared/a /shared/b --folder /nvme/models --json",
                "from a shared folder; for programs",
            ),
            ("slipstream prefetch", "the configured model, wherever it is, into memory"),
        ),
    )(prefetch)


@with_settings(*_FLAGS)
def prefetch(
    loaded: LoadedConfig,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Folders or hub ids; the configured model when none.", show_default=False
        ),
    ] = None,
    warm: Annotated[bool, typer.Option("--warm/--no-warm", help="Read the weights into the page cache.")] = True,
    readers: Annotated[int, typer.Option("--readers", min=1, max=256, help="Parallel reads while warming.")] = 8,
    verify: Annotated[bool, typer.Option("--verify", help="Compare digests of what is in the cache already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Fetch models into the local cache, read them into memory, say what was done, and end: for an init container, a
    DaemonSet, or before workers are started."""
    from slipstream import telemetry

    telemetry.configure(loaded.settings.log, component="prefetch")
    settings = loaded.settings.model_cache
    if verify and settings.folder is None:
        raise ConfigError("--verify: there are digests in a cache only; set --folder", param="verify")
    done = [_prefetch(loaded, model, warm, readers, verify) for model in models or [loaded.settings.model]]
    if as_json:
        print(json.dumps([asdict(each) for each in done], indent=2))  # noqa: T201
        return
    from slipstream.cli.terminal import output

    console = output()
    for each in done:
        console.print(_sentence(each), soft_wrap=True, highlight=False, markup=False)


def _prefetch(loaded: LoadedConfig, model: str, warm: bool, readers: int, verify: bool) -> Prefetched:
    from slipstream.model_cache import Entry, ModelCache
    from slipstream.model_folder import resolve
    from slipstream.page_cache import Warmed
    from slipstream.page_cache import warm as read_into_memory

    cache = loaded.settings.model_cache
    if cache.folder is not None:
        entry = ModelCache(cache, cache.folder.expanduser()).ensure(model, os.environ, verify=verify)
    else:
        found = resolve(model)
        size_bytes = sum(path.stat().st_size for path in found.path.iterdir() if path.is_file())
        entry = Entry(found.path, found.served_name, size_bytes)
    weights = sorted(entry.folder.glob("*.safetensors"))
    warmed = read_into_memory(weights, readers=readers) if warm else Warmed(0, 0.0, skipped="not asked for")
    return Prefetched(
        model=model,
        folder=str(entry.folder),
        size_bytes=entry.size_bytes,
        fetched_bytes=entry.fetched_bytes,
        fetch_s=round(entry.seconds, 3),
        evicted=entry.evicted,
        warmed_bytes=warmed.size_bytes,
        warm_s=round(warmed.seconds, 3),
        not_warmed=warmed.skipped,
    )


def _sentence(one: Prefetched) -> str:
    parts = [f"{one.model}: {one.size_bytes / 1e9:.2f} GB in {one.folder}"]
    parts.append(f"fetched in {one.fetch_s:.1f} s" if one.fetched_bytes else "was there")
    if one.evicted:
        parts.append(f"made room by removing {', '.join(one.evicted)}")
    if one.not_warmed:
        parts.append(f"not read into memory: {one.not_warmed}")
    else:
        rate = one.warmed_bytes / one.warm_s / 1e9 if one.warm_s else 0.0
        parts.append(f"{one.warmed_bytes / 1e9:.2f} GB read into memory in {one.warm_s:.1f} s ({rate:.1f} GB/s)")
    return "; ".join(parts)
