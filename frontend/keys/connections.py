"""Connections of a key: those over which requests with it have come, until they close.

An HTTP connection counts from its first request with a key that has a limit until it is closed. gRPC does not say when
one is: there a connection counts while a call is open on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from frontend.keys import metrics
from frontend.keys.keyring import Key
from frontend.keys.ledger import Account, Ledger, LimitError

EXTENSION = "slipstream.accounts"
"""Where a request's ASGI scope has its connection's `ConnectionAccounts`, among `extensions`."""


class ConnectionAccounts:
    """The accounts that an HTTP connection counts in; nearly always one."""

    __slots__ = ("_closed", "_held")

    def __init__(self) -> None:
        self._held: dict[str, tuple[Ledger, Account]] = {}
        self._closed = False

    def use(self, ledger: Ledger, key: Key) -> None:
        """A request came with this key.

        Raises:
            LimitError: the key has as many connections as it may.
        """
        if key.rates.connections is None or self._closed or key.account in self._held:
            return
        self._held[key.account] = ledger, _connected(ledger, key)

    def close(self) -> None:
        """The connection is gone. Again is fine."""
        self._closed = True
        while self._held:
            _, (ledger, account) = self._held.popitem()
            ledger.disconnect(account)


class CallPeers:
    """The gRPC connections of keys that have a limit, by the address of the other end."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str], tuple[int, Account]] = {}

    @contextmanager
    def calling(self, ledger: Ledger, key: Key, peer: str) -> Iterator[None]:
        """A call is open while the block runs.

        Raises:
            LimitError: as above.
        """
        if key.rates.connections is None:
            yield
            return
        name = key.account, peer
        calls, account = self._calls.get(name) or (0, _connected(ledger, key))
        self._calls[name] = calls + 1, account
        try:
            yield
        finally:
            calls, account = self._calls.pop(name)
            if calls > 1:
                self._calls[name] = calls - 1, account
            else:
                ledger.disconnect(account)


def _connected(ledger: Ledger, key: Key) -> Account:
    try:
        return ledger.connect(key)
    except LimitError as error:
        metrics.refused(error.reason)
        raise
