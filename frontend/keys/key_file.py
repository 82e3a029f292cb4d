"""The key file on disk: read with a look at who may write it, and written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from frontend.keys.entries import KeyFile, parsed
from slipstream import telemetry
from slipstream.errors import ConfigError
from slipstream.yaml_nodes import plain_values

log = telemetry.get_logger(__name__)

MAX_BYTES = 16 << 20
MAX_YAML_CHARACTERS = 1 << 20
_LOCK_TIMEOUT_S = 10.0
_LOCK_RETRY_S = 0.02
_HEAD = "# Written by `slipstream keys`: hashes of API keys, and what each may do. docs/security/api-keys.md\n"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What changes when a file's content does, or when its name comes to mean another file (a Secret's folder in
    Kubernetes is a link that is swapped)."""

    device: int
    inode: int
    changed_ns: int
    size: int


def fingerprint(path: Path) -> Fingerprint | None:
    """Of the file behind all links; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Fingerprint(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def read(path: Path) -> KeyFile:
    """The file's content.

    Raises:
        ConfigError: it is not there, not to be read, can be written by everybody, or is wrong.
    """
    try:
        with path.open("rb") as file:
            _check_mode(path, os.fstat(file.fileno()))
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"security.keys_file: {path} cannot be read: {error.strerror}", param="keys_file") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"security.keys_file: {path} is larger than {MAX_BYTES} bytes", param="keys_file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return of_text(text, str(path))


def of_text(text: str, name: str) -> KeyFile:
    """YAML, of which JSON is a part.

    Raises:
        ConfigError: it is neither, or wrong.
    """
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):  # YAML has braces too, and its errors have lines
            return parsed(json.loads(text), name)
    if len(text) > MAX_YAML_CHARACTERS:
        raise ConfigError(f"{name}: more than {MAX_YAML_CHARACTERS} characters of YAML; use JSON, which reads fast")
    content, _ = plain_values(text, name)
    return parsed(content, name)


def _check_mode(path: Path, found: os.stat_result) -> None:
    if stat.S_IMODE(found.st_mode) & stat.S_IWOTH:
        raise ConfigError(
            f"security.keys_file: everybody on this machine may write {path}, and so make keys; `chmod 600 {path}`",
            param="keys_file",
        )
    if stat.S_IMODE(found.st_mode) & stat.S_IROTH:
        # Hashes of 256 random bits are of no use to whoever reads them; tenants' names and limits may be.
        log.warning("keys_file_readable_by_all", file=str(path), remedy=f"chmod 600 {path}")


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[KeyFile]]:
    """Change the file, nobody else doing so at the same time: the block gets a list with what is there (an empty file's
    content when there is none), and what it leaves as the last of the list is written.

    Raises:
        ConfigError: the file is wrong, cannot be written, or somebody else has been changing it for ten seconds.
    """
    target = path.resolve()  # what is replaced is the file, not a link to it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        _wait_for(lock, path)
        versions = [read(target) if target.exists() else KeyFile()]
        yield versions
        if len(versions) > 1:
            _replace(target, versions[-1])
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        os.close(lock)  # and lets go of it


def _wait_for(lock: int, path: Path) -> None:
    ends_s = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= ends_s:
                raise ConfigError(f"{path}: another `slipstream keys` has held it for {_LOCK_TIMEOUT_S:g} s") from None
            time.sleep(_LOCK_RETRY_S)
        else:
            return


def _replace(target: Path, content: KeyFile) -> None:
    before = target.stat() if target.exists() else None
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    with contextlib.ExitStack() as stack:
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        stack.callback(lambda: new.unlink(missing_ok=True))
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write(as_text(content, as_json=target.suffix == ".json"))
            out.flush()
            if before is not None:  # whoever could read it shall still be able to: a frontend's group, say
                os.fchmod(out.fileno(), stat.S_IMODE(before.st_mode))
                with contextlib.suppress(PermissionError):
                    os.fchown(out.fileno(), before.st_uid, before.st_gid)
            os.fsync(out.fileno())
        new.replace(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def as_text(content: KeyFile, *, as_json: bool = False) -> str:
    """What `of_text` reads again; what has its default is left out."""
    plain = content.model_dump(mode="json", exclude_defaults=True)
    plain = {"version": content.version, **{name: plain[name] for name in ("tenants", "keys") if name in plain}}
    if as_json:
        return json.dumps(plain, indent=2) + "\n"
    # Escaped to ASCII: PyYAML writes some line separators unescaped otherwise, and reads them back as spaces.
    return _HEAD + yaml.safe_dump(plain, sort_keys=False)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {error.strerror}", param="keys_file")
