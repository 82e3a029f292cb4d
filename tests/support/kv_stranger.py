"""Somebody who talks to a transfer agent by hand, over a plain socket: as a registered worker, or as nobody at all."""

from __future__ import annotations

import hashlib
import socket
import struct
from types import TracebackType
from typing import Self

from kv_transfer import greeting, wire
from kv_transfer.greeting import Dialer, Session
from kv_transfer.identity import Identity


def identity(name: str) -> Identity:
    """The same one for the same name, in every process."""
    return Identity.of(hashlib.sha256(name.encode()).digest())


def token(handoff: str) -> bytes:
    """The token of a handoff of the tests."""
    return hashlib.sha256(f"token of {handoff}".encode()).digest()


def dial(address: str, timeout_s: float = 10.0) -> socket.socket:
    """A connection on which nothing has been said."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


class Stranger:
    """A connection that has been greeted as worker `name`, with the agent of worker `expected`. Close it."""

    def __init__(self, address: str, name: str = "node", expected: str = "node") -> None:
        self.socket = dial(address)
        self._incoming = self.socket.makefile("rb")
        try:
            self.session = self._greet(name, expected)
        except BaseException:
            self.close()
            raise

    def _greet(self, name: str, expected: str) -> Session:
        dialer = Dialer(identity(name), identity(expected).public)
        self.socket.sendall(wire.frame(greeting.encode(dialer.knock)))
        proof, session = dialer.take_answer(greeting.decode(self._frame()))
        self.socket.sendall(wire.frame(greeting.encode(proof)))
        return session

    def sealed(self, message: wire.Message) -> bytes:
        """The next message as it travels."""
        return wire.frame(self.session.sends.seal(wire.encode(message)))

    def say(self, *messages: wire.Message) -> None:
        for message in messages:
            self.socket.sendall(self.sealed(message))

    def hear(self) -> wire.Message | None:
        """The next message but pings; None when the agent has hung up."""
        while True:
            try:
                sealed = self._frame()
            except (EOFError, ConnectionError):
                return None
            message = wire.decode(self.session.receives.open(sealed))
            if not isinstance(message, wire.Ping):
                return message

    def _frame(self) -> bytes:
        head = self._incoming.read(4)
        if len(head) < 4:
            raise EOFError
        (length,) = struct.unpack(">I", head)
        return self._incoming.read(length)

    def close(self) -> None:
        self._incoming.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
