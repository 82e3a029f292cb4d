"""gRPC servers, and the ports that they listen on: with this process' certificate and token, or not at all.

Closed by default: an internal server listens plainly on this machine alone. On any other address it needs certificates
or a token, or somebody who says that it shall be open (`security.allow_insecure`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc
import grpc.aio

from slipstream import telemetry
from slipstream.errors import ConfigError, StartupError
from slipstream.security import identity as identities
from slipstream.security.audit import Audit
from slipstream.security.channels import is_local
from slipstream.security.files import TlsMaterial, Watched
from slipstream.security.guard import Guard
from slipstream.security.identity import Identity
from slipstream.security.malformed import UnreadableMessages

log = telemetry.get_logger(__name__)

Options = Sequence[tuple[str, Any]]

_KEPT: list[grpc.ServerCredentials] = []
"""gRPC's own threads ask these for certificates, and hold no reference: a handshake that is under way when a server is
gone would ask what was freed, and end the process. A process opens a port or two."""


def create_server(options: Options = ()) -> grpc.aio.Server:
    """A server for other components, which looks at who calls."""
    identity = identities.current()
    guards: list[grpc.aio.ServerInterceptor] = [Guard(identity)] if identity.protected else []
    return grpc.aio.server(interceptors=[Audit(), *guards, UnreadableMessages()], options=list(options))


def create_server_at(address: str, options: Options = ()) -> grpc.aio.Server:
    """The same for this address: on a socket in the file system, who may open that may call."""
    if is_local(address):
        return grpc.aio.server(interceptors=[Audit(), UnreadableMessages()], options=list(options))
    return create_server(options)


def create_public_server(options: Options = ()) -> grpc.aio.Server:
    """A server for clients; who they are is asked where requests are taken."""
    return grpc.aio.server(interceptors=[UnreadableMessages()], options=list(options))


def listen(server: grpc.aio.Server, address: str, *, what: str) -> int:
    """Take the port, for other components. Returns its number.

    Args:
        what: listens, for complaints.

    Raises:
        StartupError: it would be open to everybody.
        RuntimeError: gRPC cannot listen there.
    """
    identity = identities.current()
    if is_local(address):
        return server.add_insecure_port(address)
    check_closed(identity, address, what)
    if identity.tokens is not None:
        identity.tokens.current()  # or why not
    if identity.tls is None:
        return server.add_insecure_port(address)
    identity.own_name()  # or why not
    return server.add_secure_port(address, _credentials(identity.tls, asks_clients=True))


def listen_publicly(server: grpc.aio.Server, address: str) -> int:
    """Take the port, for clients. Returns its number.

    Raises:
        ConfigError: the faces' certificate cannot be read.
        RuntimeError: gRPC cannot listen there.
    """
    identity = identities.current()
    if identity.face is None or identity.face_files is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _credentials(identity.face, identity.face_files.ca is not None))


def check_closed(identity: Identity, address: str, what: str) -> None:
    """See to it that strangers are kept out.

    Raises:
        StartupError: they are not.
    """
    if identity.protected or is_loopback(address):
        return
    if identity.allow_insecure:
        log.warning(
            "open_to_everybody",
            address=address,
            what=what,
            remedy="security.allow_insecure is set: whoever reaches this address can join the cluster and use it; set "
            "security.tls_folder or security.cluster_token_file instead",
        )
        return
    raise StartupError(
        f"{what} would listen on {address}, which other machines reach, and let everybody in. Set security.tls_folder "
        "(`slipstream ca init FOLDER` makes one) or security.cluster_token_file (`slipstream ca token FILE`) here and "
        "at all other components; or, in a network that only friends reach, security.allow_insecure",
        code="open_to_everybody",
    )


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `host:port`."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(tls: Watched[TlsMaterial], asks_clients: bool) -> grpc.ServerCredentials:
    """Of the files as they are at each connection's beginning."""
    generation, material = tls.current()

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal generation
        try:
            found, now = tls.current()
        except ConfigError:  # cannot be: what was read once stays
            return None
        if found == generation:
            return None
        generation = found
        return _configuration(now)

    # The stubs do not know that None stands for "as it was".
    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", newer)
    credentials = grpc.dynamic_ssl_server_credentials(_configuration(material), fetch, asks_clients)
    _KEPT.append(credentials)
    return credentials


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key_pem, material.certificate_pem)], material.ca_pem)
