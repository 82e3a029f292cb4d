"""A certificate authority for development, and for clusters that have no other: what `slipstream ca` does.

    FOLDER/ca.pem                      to be trusted; after a change of authority the old one stays in it until it ends
    FOLDER/authority/ca-key.pem        what signs: keep it apart from the machines that serve
    FOLDER/ROLE.pem, ROLE-key.pem      one for each role, and `face` for the public faces

Keys are of the curve P-256 and in files that only their owner reads. Certificates end soon: renewing is one command,
and nothing restarts for it.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from slipstream.errors import ConfigError, StartupError
from slipstream.security.files import name_in
from slipstream.security.identity import CA_FILE, FACE, pair
from slipstream.security.names import ComponentName, ComponentRole, component_name

AUTHORITY_FOLDER = "authority"
AUTHORITY_KEY = "ca-key.pem"
AUTHORITY_DAYS = 365.0
COMPONENT_DAYS = 30.0
_CLOCKS_DIFFER_BY = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Shown:
    """A certificate in a folder."""

    path: Path
    subject: str
    names: tuple[str, ...]
    not_after: datetime
    serial: str


class Authority:
    """What signs certificates. Make one with `create` or `load`."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.folder = folder
        self.certificate = certificate
        self._key = key

    @property
    def cluster(self) -> str:
        (name,) = self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        return str(name.value)

    @classmethod
    def create(
        cls, folder: Path, cluster: str, *, days: float = AUTHORITY_DAYS, now: datetime | None = None
    ) -> Authority:
        """A new one; the old one's certificates stay good where there is one, as long as it does.

        Raises:
            ConfigError: the cluster's name cannot be one. StartupError: the folder cannot be written.
        """
        component_name(cluster, ComponentRole.WORKER, "any")  # a name that certificates could not have is refused here
        now = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(f"{cluster} authority", cluster)
        certificate = (
            _builder(subject, subject, key.public_key(), now, days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        trusted = certificate.public_bytes(Encoding.PEM) + _still_good(folder / CA_FILE, now)
        _write(folder / AUTHORITY_FOLDER / AUTHORITY_KEY, _key_pem(key), secret=True)
        _write(folder / CA_FILE, trusted)
        return cls(folder, certificate, key)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """That of a folder.

        Raises:
            ConfigError: there is none.
        """
        key_file = folder / AUTHORITY_FOLDER / AUTHORITY_KEY
        try:
            key = load_pem_private_key(key_file.read_bytes(), None)
            certificates = x509.load_pem_x509_certificates((folder / CA_FILE).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{error.filename} cannot be read ({error.strerror}): make an authority with `slipstream ca init "
                f"{folder}`"
            ) from None
        except (ValueError, TypeError):
            raise ConfigError(f"{key_file} or {folder / CA_FILE} is no PEM file") from None
        own = [one for one in certificates if one.public_key() == key.public_key()]
        if not own or not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{folder / CA_FILE} does not hold the certificate of {key_file}")
        return cls(folder, own[0], key)

    def issue_component(
        self,
        name: ComponentName,
        *,
        days: float = COMPONENT_DAYS,
        to: tuple[Path, Path] | None = None,
        now: datetime | None = None,
    ) -> Path:
        """A certificate of a component, which is server and client. Returns where it is."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(name.uri), x509.DNSName(name.dns)]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        subject = _subject(f"{name.role} {name.name}", name.cluster)
        return self._issue(subject, names, uses, days, to or pair(self.folder, name.role), now)

    def issue_face(
        self,
        hosts: Sequence[str],
        *,
        days: float = COMPONENT_DAYS,
        to: tuple[Path, Path] | None = None,
        now: datetime | None = None,
    ) -> Path:
        """A certificate of the public faces, for these host names and addresses. Returns where it is."""
        uses = [ExtendedKeyUsageOID.SERVER_AUTH]
        subject = _subject(FACE, self.cluster)
        return self._issue(subject, [_host(host) for host in hosts], uses, days, to or pair(self.folder, FACE), now)

    def issue_client(self, name: str, *, to: tuple[Path, Path], days: float = COMPONENT_DAYS) -> Path:
        """A certificate of a client of the public faces; no component takes it for one. Returns where it is."""
        component_name(self.cluster, ComponentRole.OPERATOR, name)  # the same limits
        subject = _subject(f"client {name}", self.cluster)
        names: list[x509.GeneralName] = [x509.RFC822Name(f"{name}@clients.{self.cluster}.slipstream.internal")]
        return self._issue(subject, names, [ExtendedKeyUsageOID.CLIENT_AUTH], days, to, None)

    def _issue(
        self,
        subject: x509.Name,
        names: Sequence[x509.GeneralName],
        uses: Sequence[x509.ObjectIdentifier],
        days: float,
        to: tuple[Path, Path],
        now: datetime | None,
    ) -> Path:
        now = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        own_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            _builder(subject, self.certificate.subject, key.public_key(), now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_id), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        certificate_file, key_file = to
        _write(key_file, _key_pem(key), secret=True)
        _write(certificate_file, certificate.public_bytes(Encoding.PEM))
        return certificate_file


def make_everything(
    folder: Path, cluster: str, hosts: Sequence[str], *, days: float, authority_days: float
) -> Authority:
    """A new authority and a certificate for each role and the faces.

    Raises:
        ConfigError: the folder has an authority already. StartupError: it cannot be written.
    """
    if (folder / AUTHORITY_FOLDER / AUTHORITY_KEY).exists():
        raise ConfigError(
            f"{folder} has an authority already: `slipstream ca renew {folder}` makes its certificates anew, and with "
            "--authority itself too"
        )
    authority = Authority.create(folder, cluster, days=authority_days)
    for role in ComponentRole:
        authority.issue_component(ComponentName(cluster, role, "any"), days=days)
    authority.issue_face(face_hosts(hosts), days=days)
    return authority


def face_hosts(more: Sequence[str]) -> list[str]:
    """Under which this machine is found, and these."""
    return list(dict.fromkeys(["localhost", socket.gethostname(), "127.0.0.1", "::1", *more]))


def renew(folder: Path, *, days: float, within_days: float | None, new_authority: bool) -> list[Path]:
    """Make the folder's certificates anew, for the names that they have. Returns which.

    Args:
        within_days: only those that end so soon.
        new_authority: also what signs them; the old one stays trusted until it ends.

    Raises:
        ConfigError: the folder has no authority.
    """
    authority = Authority.load(folder)
    if new_authority:
        authority = Authority.create(folder, authority.cluster)
    until = datetime.now(UTC) + timedelta(days=within_days) if within_days is not None else None
    renewed = []
    for path in certificates_in(folder):
        certificate = _certificate(path)
        if until is not None and certificate.not_valid_after_utc > until and not new_authority:
            continue
        to = (path, path.with_name(f"{path.stem}-key.pem"))
        name = name_in(certificate)
        if name is not None:
            renewed.append(authority.issue_component(name, days=days, to=to))
        elif ExtendedKeyUsageOID.SERVER_AUTH in _uses(certificate):
            renewed.append(authority.issue_face(_hosts_of(certificate), days=days, to=to))
    return renewed


def certificates_in(folder: Path) -> list[Path]:
    """The certificates of a folder that have their key beside them."""
    found = sorted(folder.glob("*.pem"))
    return [path for path in found if path.with_name(f"{path.stem}-key.pem").exists()]


def shown(folder: Path) -> list[Shown]:
    """All certificates of a folder, the authorities first.

    Raises:
        ConfigError: one cannot be read.
    """
    found = []
    for path in (folder / CA_FILE, *certificates_in(folder)):
        try:
            certificates = x509.load_pem_x509_certificates(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; `slipstream ca init` makes it") from None
        except ValueError:
            raise ConfigError(f"{path} is no PEM certificate") from None
        found += [_shown(path, certificate) for certificate in certificates]
    return found


def new_token() -> str:
    """A cluster token."""
    return secrets.token_hex(32)


def write_secret(path: Path, content: str) -> None:
    """Into a file that only its owner reads.

    Raises:
        StartupError: it cannot be written.
    """
    _write(path, content.encode(), secret=True)


def _shown(path: Path, certificate: x509.Certificate) -> Shown:
    return Shown(
        path=path,
        subject=certificate.subject.rfc4514_string(),
        names=tuple(_names_of(certificate)),
        not_after=certificate.not_valid_after_utc,
        serial=f"{certificate.serial_number:x}",
    )


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a certificate: {error}") from None


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _hosts_of(certificate: x509.Certificate) -> list[str]:
    return _names_of(certificate)


def _uses(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []


def _subject(common_name: str, cluster: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Slipstream"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, cluster),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER_BY)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError(f"--host {host} is neither a host's name nor an address", param="host") from None


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _still_good(path: Path, now: datetime) -> bytes:
    """The authorities of a file that have not ended yet."""
    if not path.exists():
        return b""
    old = x509.load_pem_x509_certificates(path.read_bytes())
    return b"".join(one.public_bytes(Encoding.PEM) for one in old if one.not_valid_after_utc > now)


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Whole or not at all; a secret is never readable for others, not for a moment."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if secret else 0o755)
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
            file.write(content)
        beside.replace(path)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}") from None
