"""Who a transfer agent is, and whom it knows: key pairs made at each start, and the registry's list of public keys.

No secret is handed out by anybody. Each agent makes a key pair when it starts; the public half travels in its worker's
registration, and each worker tells its own agent the public keys of the workers that are registered. So a restarted
control plane has nothing to remember or to guard, and a worker that is started again is another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_BYTES = 32
SIGNATURE_BYTES = 64


class Identity:
    """A key pair (Ed25519). The private half is in no message.

    Attributes:
        public: the key by which others know it.
    """

    def __init__(self, private: Ed25519PrivateKey | None = None) -> None:
        self._private = private or Ed25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    @classmethod
    def of(cls, seed: bytes) -> Identity:
        """The one that these 32 random bytes make: the agents of a worker's ranks share it (`board.Board.seed`)."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, text: bytes) -> bytes:
        return self._private.sign(text)


def has_signed(public: bytes, signature: bytes, text: bytes) -> bool:
    """Whether the owner of this key signed this text."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


class Peers:
    """Public keys of the workers that are registered, as far as this process has been told; nobody, until then."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self._keys = frozenset(keys)
        self._told = asyncio.Event()

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def set(self, keys: Iterable[bytes]) -> None:
        """These are the registered ones now. Call it in the event loop that waits."""
        self._keys = frozenset(keys)
        self._told.set()
        self._told = asyncio.Event()

    async def know(self, key: bytes, patience_s: float) -> bool:
        """Whether this key is registered. Two workers hear of each other at different times: it may come yet."""
        try:
            async with asyncio.timeout(patience_s):
                while key not in self._keys:
                    await self._told.wait()
        except TimeoutError:
            return False
        return True
