"""Where a model's files come from before they are in the local cache: a folder, or a repository of the hub.

`describe` says what there is, without moving it: names, sizes, digests where the source knows them, and an identity
that is another one as soon as the content is. `fetch` brings the files into a folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from slipstream.errors import StartupError
from slipstream.model_folder import DESCRIPTION_PATTERNS, WEIGHT_PATTERNS, is_hub_id, resolve

_CHUNK_BYTES: Final = 8 << 20
_PATTERNS: Final = (*DESCRIPTION_PATTERNS, *WEIGHT_PATTERNS)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file; `sha256` is empty where the source does not know it."""

    name: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A model where it is now.

    Attributes:
        model: as the user named it; served_name: the name clients use.
        folder: that it is in, or None: it is on the hub.
        identity: changes with the content; part of a cache entry's name.
    """

    model: str
    served_name: str
    folder: Path | None
    identity: str
    files: tuple[SourceFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def describe(model: str, environ: Mapping[str, str]) -> Source:
    """What there is of a model.

    Raises:
        StartupError: there is no such model, or the hub cannot be reached.
    """
    if is_hub_id(model):
        return _on_hub(model)
    found = resolve(model, environ=environ)
    files = []
    identity = hashlib.sha256(str(found.path).encode())
    for path in sorted(found.path.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in _PATTERNS):
            state = path.stat()
            files.append(SourceFile(path.name, state.st_size))
            identity.update(f"\0{path.name}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return Source(model, found.served_name, found.path, identity.hexdigest()[:16], tuple(files))


def fetch(source: Source, folder: Path, *, streams: int) -> dict[str, str]:
    """Bring the files into a folder, at most `streams` at a time; returns the SHA-256 of each.

    Raises:
        StartupError: the source cannot be read, has changed meanwhile, or a digest is wrong.
    """
    if source.folder is None:
        _download(source, folder, streams)
        digests = dict(zip(*_digests(folder, source.files, streams), strict=True))
    else:
        origin = source.folder
        with ThreadPoolExecutor(streams, thread_name_prefix="model-copy") as threads:
            copied = threads.map(lambda file: _copy(origin / file.name, folder / file.name), source.files)
            digests = dict(zip((file.name for file in source.files), copied, strict=True))
    for file in source.files:
        check_size(folder / file.name, file.size_bytes)
        if file.sha256 and digests[file.name] != file.sha256:
            (folder / file.name).unlink()  # or the next try would go on with it
            raise StartupError(
                f"{source.model}: {file.name} arrived with SHA-256 {digests[file.name]}, the hub says {file.sha256}"
            )
    return digests


def check_size(path: Path, size_bytes: int) -> None:
    """Raise StartupError unless a file is there whole."""
    there = path.stat().st_size if path.is_file() else -1
    if there != size_bytes:
        raise StartupError(f"{path} has {there} bytes, not {size_bytes}: it changed while it was fetched; try again")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: Path, files: tuple[SourceFile, ...], streams: int) -> tuple[list[str], list[str]]:
    names = [file.name for file in files]
    with ThreadPoolExecutor(streams, thread_name_prefix="model-digest") as threads:
        return names, list(threads.map(lambda name: sha256_of(folder / name), names))


def _copy(origin: Path, target: Path) -> str:
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with origin.open("rb") as source, target.open("wb") as sink:
        for chunk in _chunks(source.fileno()):
            digest.update(chunk)
            sink.write(chunk)
        sink.flush()
        os.fsync(sink.fileno())
    return digest.hexdigest()


def _chunks(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        yield chunk


def _on_hub(model: str) -> Source:
    try:
        info = HfApi().model_info(model, files_metadata=True)
    except (HFValidationError, GatedRepoError, RepositoryNotFoundError) as error:
        first = str(error).partition("\n")[0]
        raise StartupError(
            f"model {model!r} is neither a folder here nor a model of the hub that may be read "
            f"(gated and private ones need HF_TOKEN): {first}"
        ) from error
    except Exception as error:  # the hub's client lets its HTTP library's errors through, whichever that is
        raise StartupError(f"model {model!r}: the hub cannot be reached ({type(error).__name__}: {error})") from error
    files = tuple(
        SourceFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else "")
        for each in info.siblings or ()
        if "/" not in each.rfilename and any(Path(each.rfilename).match(pattern) for pattern in _PATTERNS)
    )
    names = {file.name for file in files}
    if not info.sha or "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise StartupError(f"model {model!r} on the hub has no config.json or no *.safetensors: it cannot be served")
    return Source(model, model, None, re.sub(r"[^0-9a-f]", "", info.sha)[:16], files)


def _download(source: Source, folder: Path, streams: int) -> None:
    names = [file.name for file in source.files]
    try:
        # What an interrupted try has left in the folder is gone on with.
        snapshot_download(source.model, local_dir=folder, allow_patterns=names, max_workers=streams)
    except Exception as error:  # as above
        raise StartupError(f"model {source.model!r}: the download broke off ({error}): try again") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's own notes
