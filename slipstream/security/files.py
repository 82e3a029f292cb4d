"""Certificates and tokens on disk, read again when they change, so that nothing restarts for new ones.

Each is looked at no more than once a second, by whoever needs it next. What cannot be read, or does not fit together,
while files are being replaced changes nothing: the last that did stays, and a log line says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from slipstream import telemetry
from slipstream.errors import ConfigError
from slipstream.security.names import ComponentName, parse_uri

log = telemetry.get_logger(__name__)

T = TypeVar("T")

LOOK_EVERY_S = 1.0
LEAST_TOKEN_CHARS = 16
MOST_FILE_BYTES = 1 << 20
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a certificate is.

    Attributes:
        ca: of those whom the other side's certificate must come from; None where the other side needs none.
        setting: what to name in complaints.
    """

    certificate: Path
    key: Path
    ca: Path | None
    setting: str = "security.certificate_file"


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What is in them.

    Attributes:
        name: whose the certificate is; None when it is no component's.
        not_after_unix_s: when it ends, and when the last of the authorities does.
    """

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes | None
    name: ComponentName | None
    not_after_unix_s: float
    ca_not_after_unix_s: float | None


class Watched(Generic[T]):
    """What some files hold, as of a second ago. Safe to use from several threads.

    Args:
        read: what is in them now; raises ConfigError when that is of no use.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp: _Stamp = ()
        self._generation = 0
        self._value: T | None = None
        self._look_at_s = 0.0
        self._told = ""

    def current(self) -> tuple[int, T]:
        """What is in them, and how many times it has changed.

        Raises:
            ConfigError: it has never been of use.
        """
        with self._lock:
            now_s = self._clock()
            if self._value is None or now_s >= self._look_at_s:
                self._look_at_s = now_s + LOOK_EVERY_S
                self._look()
            assert self._value is not None
            return self._generation, self._value

    def _look(self) -> None:
        try:
            stamp = _stamp(self._paths)
            if self._value is not None and stamp == self._stamp:
                return
            self._value = self._read()
        except ConfigError as error:
            if self._value is None:
                raise
            if error.message != self._told:  # the next look tries again
                self._told = error.message
                log.warning("old_certificates_stay", reason=error.message)
            return
        if self._generation:
            log.info("certificates_read_again", files=[str(path) for path in self._paths])
        self._stamp, self._generation, self._told = stamp, self._generation + 1, ""


def watched_tls(files: TlsFiles) -> Watched[TlsMaterial]:
    """A certificate, its key and its authorities."""
    paths = [files.certificate, files.key, *([files.ca] if files.ca is not None else [])]
    return Watched(paths, lambda: read_tls(files))


def watched_tokens(path: Path) -> Watched[tuple[str, ...]]:
    """The tokens of a file, the one to send first."""
    return Watched([path], lambda: read_tokens(path))


def read_tls(files: TlsFiles) -> TlsMaterial:
    """What is in them.

    Raises:
        ConfigError: a file cannot be read, is no certificate or key, or they do not fit together.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    certificate_pem, key_pem = _content(files.certificate, files.setting), _content(files.key, files.setting)
    ca_pem = _content(files.ca, "security.ca_file") if files.ca is not None else None
    try:
        certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
        authorities = x509.load_pem_x509_certificates(ca_pem) if ca_pem is not None else []
    except (ValueError, IndexError):
        raise ConfigError(f"{files.setting}: {files.certificate} or {files.ca} holds no PEM certificate") from None
    try:
        key = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError):
        raise ConfigError(f"{files.setting}: {files.key} holds no PEM key without a password") from None
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{files.setting}: the key in {files.key} is not that of {files.certificate}")
    ends = [one.not_valid_after_utc.timestamp() for one in authorities]
    return TlsMaterial(
        certificate_pem=certificate_pem,
        key_pem=key_pem,
        ca_pem=ca_pem,
        name=name_in(certificate),
        not_after_unix_s=certificate.not_valid_after_utc.timestamp(),
        ca_not_after_unix_s=max(ends) if ends else None,
    )


def name_in(certificate: object) -> ComponentName | None:
    """Whose a certificate (of `cryptography`) is; None when it is no component's."""
    from cryptography import x509

    assert isinstance(certificate, x509.Certificate)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    found = [parse_uri(uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    return next((name for name in found if name is not None), None)


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file, a line each; lines that begin with # are remarks.

    Raises:
        ConfigError: there is none, or one is too short to be a secret, or cannot be sent.
    """
    setting = "security.cluster_token_file"
    lines = [line.strip() for line in _content(path, setting).decode("utf-8", "replace").splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise ConfigError(f"{setting}: {path} holds no token; make one with `openssl rand -hex 32`", param=setting)
    if any(len(token) < LEAST_TOKEN_CHARS or not token.isascii() or not token.isprintable() for token in tokens):
        raise ConfigError(
            f"{setting}: a token in {path} is shorter than {LEAST_TOKEN_CHARS} characters, or not plain ASCII; make "
            "one with `openssl rand -hex 32`",
            param=setting,
        )
    return tokens


def _content(path: Path, setting: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error.strerror}", param=setting) from None
    if len(content) > MOST_FILE_BYTES:
        raise ConfigError(f"{setting}: {path} is larger than {MOST_FILE_BYTES} bytes", param=setting)
    return content


def _stamp(paths: Sequence[Path]) -> _Stamp:
    try:
        return tuple((said.st_mtime_ns, said.st_size, said.st_ino) for said in (path.stat() for path in paths))
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
