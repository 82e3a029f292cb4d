"""How commands talk to the public faces of a cluster whose certificates they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slipstream.addresses import host_port, reachable
from slipstream.security.identity import CA_FILE, face_files_of, pair
from slipstream.security.names import ComponentRole
from slipstream.security_settings import SecuritySettings
from slipstream.settings import Settings

if TYPE_CHECKING:
    from slipstream.client import Tls


def face_tls(settings: SecuritySettings) -> Tls | None:
    """For the client; None where the faces speak plainly.

    The authority is that of the folder, where there is one: it signed the faces' certificate.
    """
    from slipstream.client import Tls

    files, folder = face_files_of(settings), settings.tls_folder
    if folder is None:  # the chain of the faces' own certificate ends with whom to trust, as far as this can know
        return None if files is None else Tls(ca_file=files.certificate)
    certificate, key = pair(folder, ComponentRole.OPERATOR)
    if not certificate.exists():
        return Tls(ca_file=folder / CA_FILE)
    return Tls(ca_file=folder / CA_FILE, certificate_file=certificate, key_file=key)


def http_address(settings: Settings) -> str:
    """Of the HTTP face that the settings name."""
    scheme = "http" if face_tls(settings.security) is None else "https"
    return f"{scheme}://{host_port(reachable(settings.frontend.host), settings.frontend.http_port)}"


def api_key(settings: Settings) -> str | None:
    """The key with which frontends are asked."""
    return None if settings.api_key is None else settings.api_key.get_secret_value()
