"""Channels to other components, with this process' certificate and token; and of clients to the public face.

Without protection they are gRPC's own channels. With it, a channel looks before each call whether the certificate was
renewed, and makes the call on a new connection if so: calls that are open stay where they are, and the connection ends
with the last of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from slipstream.errors import ConfigError
from slipstream.security import identity as identities
from slipstream.security.files import TlsMaterial
from slipstream.security.guard import TOKEN_KEY
from slipstream.security.identity import Identity
from slipstream.security.names import ComponentRole, server_name

Options = Sequence[tuple[str, Any]]

_LOCAL = ("unix:", "unix-abstract:")


def open_channel(address: str, *, peer: ComponentRole, options: Options = ()) -> grpc.aio.Channel:
    """A channel to another component.

    Args:
        peer: what has to answer there: nothing else is talked to.

    Raises:
        ConfigError: this process' certificate or token cannot be read.
    """
    identity = identities.current()
    if is_local(address) or not identity.protected:
        return grpc.aio.insecure_channel(address, options=list(options))
    return ProtectedChannel(address, identity, peer, options)


def open_blocking_channel(address: str, *, peer: ComponentRole, options: Options = ()) -> grpc.Channel:
    """The same for the synchronous API; it lives for a command, and looks for no new certificate.

    Raises:
        ConfigError: as `open_channel`.
    """
    identity = identities.current()
    if is_local(address):
        return grpc.insecure_channel(address, options=list(options))
    if identity.tls is None:
        channel = grpc.insecure_channel(address, options=list(options))
    else:
        credentials, more = _client_side(identity, peer)
        channel = grpc.secure_channel(address, credentials, options=[*options, *more])
    if identity.tokens is None:
        return channel
    intercepted: grpc.Channel = grpc.intercept_channel(channel, _TokenInterceptor(identity))
    return intercepted


def is_local(address: str) -> bool:
    """Whether it is a socket in the file system, which has an owner and permissions."""
    return address.startswith(_LOCAL)


def public_credentials(
    ca_file: Path | str | None, certificate_file: Path | str | None, key_file: Path | str | None
) -> grpc.ChannelCredentials:
    """Of a client of the public face.

    Args:
        ca_file: whom to trust; the system's authorities when None.

    Raises:
        ConfigError: a file cannot be read.
    """
    if (certificate_file is None) != (key_file is None):
        raise ConfigError("a client's certificate and its key are given together")
    try:
        ca, certificate, key = (
            Path(path).read_bytes() if path else None for path in (ca_file, certificate_file, key_file)
        )
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
    return grpc.ssl_channel_credentials(ca, key, certificate)


def open_public_channel(
    target: str, credentials: grpc.ChannelCredentials | None, options: Options = ()
) -> grpc.aio.Channel:
    """A channel to a public face; plain without credentials."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=list(options))
    return grpc.aio.secure_channel(target, credentials, options=list(options))


def open_blocking_public_channel(
    target: str, credentials: grpc.ChannelCredentials | None, options: Options = ()
) -> grpc.Channel:
    """The same for the synchronous API."""
    if credentials is None:
        return grpc.insecure_channel(target, options=list(options))
    return grpc.secure_channel(target, credentials, options=list(options))


class ProtectedChannel(grpc.aio.Channel):
    """A channel that proves what this process is, with what its files hold at each call."""

    def __init__(self, address: str, identity: Identity, peer: ComponentRole, options: Options) -> None:
        self._address, self._identity, self._peer, self._options = address, identity, peer, options
        self._connection = self._connect()
        self._left: set[_Connection] = set()
        self._closed = False

    def connection(self) -> _Connection:
        """The one for a call that is made now."""
        tls = self._identity.tls
        if tls is not None and not self._closed and tls.current()[0] != self._connection.generation:
            self._left.add(self._connection)
            self._connection.leave(self._left.discard)
            self._connection = self._connect()
        return self._connection

    def token(self) -> tuple[tuple[str, str], ...]:
        """What to send besides a call's own metadata."""
        tokens = self._identity.tokens
        return () if tokens is None else ((TOKEN_KEY, tokens.current()[1][0]),)

    def _connect(self) -> _Connection:
        if self._identity.tls is None:
            return _Connection(grpc.aio.insecure_channel(self._address, options=list(self._options)), 0)
        generation, _ = self._identity.tls.current()
        credentials, more = _client_side(self._identity, self._peer)
        channel = grpc.aio.secure_channel(self._address, credentials, options=[*self._options, *more])
        return _Connection(channel, generation)

    async def __aenter__(self) -> ProtectedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        self._closed = True
        await asyncio.gather(*(one.channel.close(grace) for one in (self._connection, *self._left)))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.connection().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._connection.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.connection().channel.channel_ready()

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Any:
        return self._method(lambda channel: channel.unary_unary(method, *arguments, **named))

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Any:
        return self._method(lambda channel: channel.unary_stream(method, *arguments, **named))

    def stream_unary(self, method: str, *arguments: Any, **named: Any) -> Any:
        return self._method(lambda channel: channel.stream_unary(method, *arguments, **named))

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Any:
        return self._method(lambda channel: channel.stream_stream(method, *arguments, **named))

    def _method(self, make: Callable[[grpc.aio.Channel], Any]) -> Callable[..., Any]:
        made: tuple[_Connection, Any] | None = None

        def call(*arguments: Any, metadata: Any = None, **named: Any) -> Any:
            nonlocal made
            connection = self.connection()
            if made is None or made[0] is not connection:
                made = (connection, make(connection.channel))
            begun = made[1](*arguments, metadata=(*(metadata or ()), *self.token()), **named)
            connection.calls += 1
            begun.add_done_callback(connection.ended)
            return begun

        return call


class _Connection:
    """A channel of gRPC's, with the certificate of one moment."""

    def __init__(self, channel: grpc.aio.Channel, generation: int) -> None:
        self.channel = channel
        self.generation = generation
        self.calls = 0
        self._on_closed: Callable[[_Connection], None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def leave(self, on_closed: Callable[[_Connection], None]) -> None:
        """No call is made on it any more: close it after the last."""
        self._on_closed = on_closed
        self._close_when_idle()

    def ended(self, _: object) -> None:
        self.calls -= 1
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self._on_closed is not None and not self.calls and self._closing is None:
            self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        await self.channel.close()
        if self._on_closed is not None:
            self._on_closed(self)


class _TokenInterceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the token to each call of the synchronous API."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def _with_token(self, details: Any) -> Any:
        assert self._identity.tokens is not None
        token = (TOKEN_KEY, self._identity.tokens.current()[1][0])
        return details._replace(metadata=(*(details.metadata or ()), token))


def _client_side(identity: Identity, peer: ComponentRole) -> tuple[grpc.ChannelCredentials, Options]:
    assert identity.tls is not None
    material: TlsMaterial = identity.tls.current()[1]
    credentials = grpc.ssl_channel_credentials(material.ca_pem, material.key_pem, material.certificate_pem)
    return credentials, [("grpc.ssl_target_name_override", server_name(identity.own_name().cluster, peer))]
