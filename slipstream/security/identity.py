"""What this process is to the others: its role, its certificate and its tokens, for all of its channels and servers.

One for the whole process, as a process has one certificate: set where it starts (`install`), asked for where channels
and ports are opened. Files are read when they are first needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slipstream.errors import ConfigError
from slipstream.security.files import TlsFiles, TlsMaterial, Watched, watched_tls, watched_tokens
from slipstream.security.names import ComponentName, ComponentRole
from slipstream.security_settings import SecuritySettings

FACE = "face"
CA_FILE = "ca.pem"


@dataclass(frozen=True, slots=True)
class Identity:
    """How a process proves what it is.

    Attributes:
        role: None in a process that is nothing to anybody.
        tls: its certificate; None: it speaks plainly.
        tokens: those of the cluster, of which it sends the first; None: it sends none and asks for none.
        face: of the public faces; its files' `ca` is that of their clients.
        allow_insecure: it may listen without protection where other machines reach it.
    """

    role: ComponentRole | None = None
    files: TlsFiles | None = None
    tls: Watched[TlsMaterial] | None = None
    tokens: Watched[tuple[str, ...]] | None = None
    face_files: TlsFiles | None = None
    face: Watched[TlsMaterial] | None = None
    allow_insecure: bool = False
    metrics: str = "mtls"

    @property
    def protected(self) -> bool:
        """Whether strangers are told from components."""
        return self.tls is not None or self.tokens is not None

    def own_name(self) -> ComponentName:
        """As its certificate says.

        Raises:
            ConfigError: the certificate cannot be read, or is not this role's.
        """
        assert self.tls is not None, "it has no certificate"
        assert self.files is not None
        name = self.tls.current()[1].name
        if name is None:
            raise ConfigError(
                f"{self.files.setting}: {self.files.certificate} is no component's: it has no URI "
                "spiffe://slipstream/CLUSTER/ROLE/NAME. `slipstream ca issue` makes such certificates",
                param=self.files.setting,
            )
        if self.role is not None and name.role is not self.role:
            raise ConfigError(
                f"{self.files.setting}: {self.files.certificate} is that of a {name.role}, and this is a {self.role}",
                param=self.files.setting,
            )
        return name


_NOBODY = Identity()
_current = _NOBODY


def current() -> Identity:
    """Of this process."""
    return _current


def install(settings: SecuritySettings, role: ComponentRole) -> Identity:
    """Be that from now on.

    Raises:
        ConfigError: settings contradict each other.
    """
    global _current
    _current = made_of(settings, role)
    return _current


@contextmanager
def installed(settings: SecuritySettings, role: ComponentRole) -> Iterator[Identity]:
    """Be that while the block runs."""
    global _current
    before = _current
    try:
        yield install(settings, role)
    finally:
        _current = before


def made_of(settings: SecuritySettings, role: ComponentRole) -> Identity:
    """What the settings make of a process in that role.

    Raises:
        ConfigError: they contradict each other.
    """
    files, face_files = component_files(settings, role), face_files_of(settings)
    return Identity(
        role=role,
        files=files,
        tls=watched_tls(files) if files is not None else None,
        tokens=watched_tokens(settings.cluster_token_file) if settings.cluster_token_file is not None else None,
        face_files=face_files,
        face=watched_tls(face_files) if face_files is not None else None,
        allow_insecure=settings.allow_insecure,
        metrics=settings.metrics,
    )


def component_files(settings: SecuritySettings, role: ComponentRole) -> TlsFiles | None:
    """Where the certificate of a role is."""
    folder, setting = settings.tls_folder, "security.certificate_file"
    ca, certificate, key = settings.ca_file, settings.certificate_file, settings.key_file
    if folder is not None:
        setting = "security.tls_folder" if certificate is None else setting
        ca = ca or folder / CA_FILE
        if certificate is None and key is None:
            certificate, key = pair(folder, role)
    if ca is None and certificate is None and key is None:
        return None
    if ca is None or certificate is None or key is None:
        given = {"ca_file": ca, "certificate_file": certificate, "key_file": key}
        missing = [f"security.{name}" for name, path in given.items() if path is None]
        raise ConfigError(
            f"{' and '.join(missing)} must be set too: components need their authority, a certificate and its key",
            param=missing[0],
        )
    return TlsFiles(certificate, key, ca, setting)


def face_files_of(settings: SecuritySettings) -> TlsFiles | None:
    """Where the certificate of the public faces is."""
    certificate, key = settings.face_certificate_file, settings.face_key_file
    if certificate is None and key is None and settings.tls_folder is not None:
        certificate, key = pair(settings.tls_folder, FACE)
        if not certificate.exists():
            certificate = key = None
    if certificate is None and key is None:
        if settings.face_client_ca_file is not None:
            raise ConfigError(
                "security.face_client_ca_file needs security.face_certificate_file: only over TLS clients show "
                "certificates",
                param="security.face_client_ca_file",
            )
        return None
    if certificate is None or key is None:
        raise ConfigError(
            "security.face_certificate_file and security.face_key_file are set together",
            param="security.face_certificate_file",
        )
    return TlsFiles(certificate, key, settings.face_client_ca_file, "security.face_certificate_file")


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate and its key, as `slipstream ca` names them."""
    return folder / f"{name}.pem", folder / f"{name}-key.pem"
