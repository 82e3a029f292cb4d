"""Why nobody answers on a port that is open: gRPC says the same of a wrong certificate, of none, and of plain text."""

from __future__ import annotations

import socket
import ssl

from slipstream.errors import ConfigError
from slipstream.security import identity as identities
from slipstream.security.http_ends import client_context, name_demanded
from slipstream.security.names import ComponentRole

TIMEOUT_S = 1.0


def why_unreachable(address: str, peer: ComponentRole) -> str:
    """A remedy to add to a complaint; empty where certificates are not the reason. Waits `TIMEOUT_S` a step at most."""
    host, _, port = address.rpartition(":")
    protected = identities.current().tls is not None
    try:
        context, name = (client_context(), name_demanded(peer)) if protected else (_trusting(), None)
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S) as plain:
            return _shaken(context, plain, name, protected=protected)
    except (OSError, ValueError, ConfigError):
        return ""


def _shaken(context: ssl.SSLContext, plain: socket.socket, name: str | None, *, protected: bool) -> str:
    try:
        with context.wrap_socket(plain, server_hostname=name) as connection:
            if not protected:
                return (
                    "; it speaks TLS: set security.tls_folder (--tls FOLDER), or security.ca_file with "
                    "security.certificate_file and security.key_file"
                )
            connection.recv(1)  # whether it takes our certificate comes after the handshake
            return ""
    except ssl.SSLCertVerificationError as error:
        return f"; its certificate is not what security.ca_file and the cluster's name demand: {error.verify_message}"
    except TimeoutError:
        return ""
    except ssl.SSLError as error:
        if not protected:
            return ""
        if error.reason is not None and "ALERT" in error.reason:
            return f"; it does not take the certificate of security.certificate_file: {error.reason}"
        return "; it does not speak TLS, and this process has security.certificate_file or security.tls_folder"


def _trusting() -> ssl.SSLContext:
    """Nothing is said over it but that somebody is there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
