"""Models on a local disk: each fetched once for all workers of a machine, whole or not at all, within limits.

An entry is a folder `NAME@IDENTITY` with the model's files and a manifest of their sizes and digests. It is made beside
its place and renamed into it, so it is whole whenever it exists; the source's content is in its name, so a model that
changes gets another entry. One process at a time fetches an entry (a lock that the kernel releases with its holder),
and whoever uses one holds it shared until it ends: an entry in use is not evicted. When there is no room the entries
that were used longest ago go first.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from slipstream import telemetry
from slipstream.errors import StartupError
from slipstream.model_folder import ModelFolder, is_hub_id, resolve
from slipstream.model_source import Source, SourceFile, check_size, describe, fetch, sha256_of
from slipstream.settings import Settings
from slipstream.worker_settings import ModelCacheSettings

log = telemetry.get_logger(__name__)

MANIFEST: Final = ".slipstream.json"
_LOCK_POLL_S: Final = 0.1
# Ends with the process. An entry in it is in use by this process, and not evicted.
_held: dict[Path, int] = {}


class Manifest(msgspec.Struct, frozen=True):
    """What an entry holds."""

    model: str
    served_name: str
    files: tuple[SourceFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Entry:
    """A model in the cache.

    Attributes:
        fetched_bytes: that were brought here now; 0: it was here.
        seconds: that this took, the wait for others included.
        evicted: names of entries that made room.
    """

    folder: Path
    served_name: str
    size_bytes: int
    fetched_bytes: int = 0
    seconds: float = 0.0
    evicted: tuple[str, ...] = ()


def local_model(settings: Settings, environ: Mapping[str, str]) -> ModelFolder:
    """The model's folder for an engine: in the cache when one is set, else wherever it is.

    Raises:
        StartupError: there is no such model, no room for it, or it cannot be fetched.
    """
    weights = settings.worker.engine == "vllm"
    cache = settings.model_cache.folder
    if cache is None or not weights:
        return resolve(settings.model, weights=weights, environ=environ)
    entry = ModelCache(settings.model_cache, cache.expanduser()).ensure(settings.model, environ)
    return ModelFolder(entry.folder, entry.served_name)


class ModelCache:
    """The cache in one folder, which is made when need be."""

    def __init__(
        self,
        settings: ModelCacheSettings,
        folder: Path,
        *,
        clock: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._settings = settings
        self._folder = folder.absolute()
        self._clock = clock
        self._free_bytes = free_bytes

    def ensure(self, model: str, environ: Mapping[str, str], *, verify: bool = False) -> Entry:
        """The entry of a model, fetched first when it is not here; held for this process until it ends.

        Args:
            verify: read the whole entry and compare digests, not sizes alone; what is wrong is fetched again.

        Raises:
            StartupError: see `local_model`.
        """
        began_s = time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                source = describe(model, environ)
            except StartupError:
                # A machine that restarts while the hub is out of reach serves what it has.
                latest = self._latest(model) if is_hub_id(model) else None
                if latest is None:
                    raise
                log.warning("model_source_unreachable", model=model, using=latest.name)
                with self._only_one(latest.name):
                    return self._use(latest, began_s)
            folder = self._folder / f"{_safe(source.served_name)}@{source.identity}"
            with self._only_one(folder.name):
                if not _whole(folder, verify=verify):
                    return self._fetch(source, folder, began_s)
                return self._use(folder, began_s)
        except OSError as error:
            raise StartupError(f"model_cache.folder: cannot keep {model!r} in {self._folder}: {error}") from error

    def entries(self) -> list[Path]:
        """Whole ones, those used longest ago first."""
        found = [path.parent for path in self._folder.glob(f"[!.]*@*/{MANIFEST}")]
        return sorted(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime)

    def _use(self, folder: Path, began_s: float) -> Entry:
        self._hold(folder)
        now_s = self._clock()
        os.utime(folder / MANIFEST, (now_s, now_s))
        manifest = _read(folder)
        return Entry(folder, manifest.served_name, manifest.size_bytes, seconds=time.monotonic() - began_s)

    def _fetch(self, source: Source, folder: Path, began_s: float) -> Entry:
        partial = self._folder / f".partial-{folder.name}"
        shutil.rmtree(folder, ignore_errors=True)  # not whole, or it would not be fetched
        if source.folder is not None:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        evicted = self._make_room(source, max(0, source.size_bytes - there))
        log.info("model_fetch_began", model=source.model, size_bytes=source.size_bytes, into=str(folder))
        digests = fetch(source, partial, streams=self._settings.streams)
        files = tuple(SourceFile(file.name, file.size_bytes, digests[file.name]) for file in source.files)
        manifest = Manifest(source.model, source.served_name, files)
        (partial / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        partial.rename(folder)
        used = self._use(folder, began_s)
        log.info("model_fetched", model=source.model, fetched_bytes=source.size_bytes, seconds=round(used.seconds, 3))
        return Entry(folder, source.served_name, source.size_bytes, source.size_bytes, used.seconds, evicted)

    def _make_room(self, source: Source, needed_bytes: int) -> tuple[str, ...]:
        """Evict until the model fits.

        Raises:
            StartupError: it would not fit even alone, or all others are in use.
        """
        limit = self._settings.limit_bytes
        if limit is not None and source.size_bytes > limit:
            raise StartupError(
                f"model_cache.limit_bytes: {source.model!r} has {source.size_bytes} bytes, the limit is {limit}"
            )
        evicted: list[str] = []
        for oldest in [*self.entries(), None]:
            kept = sum(_read(entry).size_bytes for entry in self.entries())
            fits = limit is None or kept + source.size_bytes <= limit
            free = self._free_bytes(self._folder) - self._settings.spare_bytes
            if fits and free >= needed_bytes:
                return tuple(evicted)
            if oldest is not None and self._evict(oldest):
                evicted.append(oldest.name)
        raise StartupError(
            f"model_cache.folder: no room for {source.model!r} in {self._folder}: {needed_bytes} bytes are needed, "
            f"{max(0, free)} are free beside model_cache.spare_bytes ({self._settings.spare_bytes}), "
            f"the entries there have {kept} (limit {'none' if limit is None else limit}) and are in use"
        )

    def _evict(self, entry: Path) -> bool:
        """Remove an entry unless somebody uses it, or is about to."""
        with ExitStack() as locks:
            for purpose in ("fetch", "use"):
                file = locks.enter_context(self._lock_file(entry.name, purpose).open("w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            doomed = self._folder / f".evicted-{entry.name}"
            entry.rename(doomed)  # gone at once; the rest takes time
            shutil.rmtree(doomed)
        log.info("model_evicted", entry=entry.name)
        return True

    def _hold(self, entry: Path) -> None:
        if entry in _held:
            return
        descriptor = os.open(self._lock_file(entry.name, "use"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _held[entry] = descriptor

    @contextmanager
    def _only_one(self, name: str) -> Iterator[None]:
        """Hold the lock under which an entry is fetched.

        Raises:
            StartupError: others held it for longer than `timeout_s`.
        """
        deadline_s = time.monotonic() + self._settings.timeout_s
        with self._lock_file(name, "fetch").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise StartupError(
                            f"another process has been fetching {name} for {self._settings.timeout_s:g} s "
                            "(model_cache.timeout_s)"
                        ) from None
                    time.sleep(_LOCK_POLL_S)
            yield

    def _lock_file(self, name: str, purpose: str) -> Path:
        folder = self._folder / ".locks"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.{purpose}"

    def _latest(self, model: str) -> Path | None:
        named = [entry for entry in self.entries() if entry.name.rpartition("@")[0] == _safe(model)]
        return named[-1] if named else None


def release_all() -> None:
    """Let go of all entries that this process holds; they may then be evicted."""
    while _held:
        os.close(_held.popitem()[1])


def _safe(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "--", model.strip("/"))[-120:]


def _read(folder: Path) -> Manifest:
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise StartupError(f"{folder} is no entry of a model cache: {error}") from error


def _whole(folder: Path, *, verify: bool) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        files = _read(folder).files
        for file in files:
            check_size(folder / file.name, file.size_bytes)
    except StartupError as error:
        log.warning("cached_model_is_damaged", entry=folder.name, error=error.message)
        return False
    wrong = [file.name for file in files if verify and sha256_of(folder / file.name) != file.sha256]
    if wrong:
        log.warning("cached_model_is_damaged", entry=folder.name, error=f"wrong digests: {', '.join(wrong)}")
    return not wrong
