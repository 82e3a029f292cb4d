"""How many connections there are, of which client address, and which of them may go when there are too many.

A connection without a request is idle, and the one that has been idle longest is given up first: an honest client opens
another, and who holds connections open for nothing loses them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Addressed(Protocol):
    """A connection; it is its own name."""

    @property
    def address(self) -> str: ...
    def __hash__(self) -> int: ...


Connection = TypeVar("Connection", bound=Addressed)


class Verdict(enum.Enum):
    """What becomes of a new connection."""

    WELCOME = "welcome"
    TOO_MANY = "too_many_connections"
    TOO_MANY_OF_ADDRESS = "too_many_connections_of_address"


@dataclass(slots=True)
class _Address(Generic[Connection]):
    count: int = 0
    idle: dict[Connection, None] = field(default_factory=dict)  # longest idle first


class ConnectionTable(Generic[Connection]):
    """The connections of one process.

    Args:
        most: of all.
        most_per_address: of one client address.
    """

    def __init__(self, *, most: int, most_per_address: int) -> None:
        self.most, self.most_per_address = most, most_per_address
        self._addresses: dict[str, _Address[Connection]] = {}
        self._idle: dict[Connection, None] = {}
        self.count = 0

    def open(self, connection: Connection) -> tuple[Verdict, Connection | None]:
        """Take a connection in, idle as it is, unless there is no room for it.

        Returns:
            What becomes of it, and the idle one to close in its favour if one must go. That is forgotten already.
        """
        own = self._addresses.get(connection.address)
        evicted: Connection | None = None
        if own is not None and own.count >= self.most_per_address:
            evicted = next(iter(own.idle), None)
            if evicted is None:
                return Verdict.TOO_MANY_OF_ADDRESS, None
        elif self.count >= self.most:
            evicted = next(iter(self._idle), None)
            if evicted is None:
                return Verdict.TOO_MANY, None
        if evicted is not None:
            self.close(evicted)
        own = self._addresses.setdefault(connection.address, _Address())
        own.count += 1
        self.count += 1
        self.idle(connection)
        return Verdict.WELCOME, evicted

    def idle(self, connection: Connection) -> None:
        """It has no request from now on."""
        own = self._addresses.get(connection.address)
        if own is not None:
            own.idle[connection] = None
            self._idle[connection] = None

    def busy(self, connection: Connection) -> None:
        """It has one."""
        if connection in self._idle:
            del self._idle[connection]
            del self._addresses[connection.address].idle[connection]

    def close(self, connection: Connection) -> None:
        """Forget a connection that was taken in."""
        self.busy(connection)
        own = self._addresses[connection.address]
        own.count -= 1
        self.count -= 1
        if not own.count:
            del self._addresses[connection.address]
