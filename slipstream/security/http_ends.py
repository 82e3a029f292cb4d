"""TLS for HTTP: the public face, /metrics of workers and control plane, and the command line that asks them.

One context serves for as long as its server does; each connection that begins gets the certificate, and the authorities
of clients, that the files hold by then.
"""

from __future__ import annotations

import ssl
import urllib.request
from typing import Any

from slipstream.errors import ConfigError
from slipstream.security import identity as identities
from slipstream.security.files import TlsFiles, TlsMaterial, Watched
from slipstream.security.names import ComponentRole, server_name


def face_context() -> ssl.SSLContext | None:
    """Of the public HTTP face; None: it speaks plainly.

    Raises:
        ConfigError: its certificate cannot be read.
    """
    identity = identities.current()
    if identity.face is None or identity.face_files is None:
        return None
    return _following(identity.face_files, identity.face, asks_clients=identity.face_files.ca is not None)


def metrics_context() -> ssl.SSLContext | None:
    """Of a component's /metrics; None: it speaks plainly.

    Raises:
        ConfigError: the component's certificate cannot be read.
    """
    identity = identities.current()
    if identity.tls is None or identity.files is None or identity.metrics == "plain":
        return None
    return _following(identity.files, identity.tls, asks_clients=identity.metrics == "mtls")


def client_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Of this process, where it asks a component or a public face: it trusts the cluster's authority, or the system's.

    Raises:
        ConfigError: this process' certificate cannot be read.
    """
    files = identities.current().files
    ca_file = ca_file or (str(files.ca) if files is not None else None)
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if files is not None:
            context.load_cert_chain(files.certificate, files.key)
    except OSError as error:
        raise ConfigError(f"security.ca_file: {ca_file}, or this process' certificate: {error}") from None
    return context


def probing_context() -> ssl.SSLContext:
    """Of who asks a child of its own whether it is ready: nothing is said that could matter, whoever listens."""
    context = client_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def name_demanded(peer: ComponentRole) -> str | None:
    """What the certificate of a component that is asked over HTTP has to say; None without a certificate of our own."""
    identity = identities.current()
    return server_name(identity.own_name().cluster, peer) if identity.tls is not None else None


def opened(url: str, timeout_s: float, api_key: str | None = None) -> Any:
    """`urllib.request.urlopen`, which trusts the cluster's authority where it is known."""
    context = client_context() if url.startswith("https:") else None
    request = urllib.request.Request(url)
    if api_key is not None:
        # Not to where an answer may send us on: the key is for this frontend.
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")
    return urllib.request.urlopen(request, timeout=timeout_s, context=context)


def _following(files: TlsFiles, watched: Watched[TlsMaterial], *, asks_clients: bool) -> ssl.SSLContext:
    generation, _ = watched.current()
    newest = first = _context(files, asks_clients)

    def as_of_now(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        """Called as each connection begins, whether or not its client names a host."""
        nonlocal generation, newest
        found, _ = watched.current()
        if found != generation:
            try:
                newest = _context(files, asks_clients)
            except ConfigError:  # replaced once more this very moment; the next connection finds it whole
                pass
            else:
                generation = found
        if newest is not first:
            connection.context = newest

    first.sni_callback = as_of_now
    return first


def _context(files: TlsFiles, asks_clients: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key)
        if asks_clients and files.ca is not None:
            context.load_verify_locations(files.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # ssl's errors are such
        raise ConfigError(f"{files.setting}: {files.certificate}: {error}", param=files.setting) from None
    return context
