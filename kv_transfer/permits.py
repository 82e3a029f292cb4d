"""What allows one handoff: a token that the frontend makes for it and tells both workers, and no one else.

A request's two calls carry the same 32 random bytes. They never travel between the workers: each shows the other that
it has them, by a MAC over the handoff, the session (so over both workers' keys) and what is said. Whoever only saw the
handoff's id, or what another pair of workers said, can do nothing with it. The sender also knows which worker the
blocks are for. A permit lives as long as the handoff, which ends with its lease: there is no clock to compare.
"""

from __future__ import annotations

import hmac

import msgspec

from slipstream.errors import TransferError

TOKEN_BYTES = 32


class Permit(msgspec.Struct, frozen=True, array_like=True):
    """At the sender: who may receive a handoff.

    Attributes:
        token: the handoff's. receiver: the public key of the receiver's agent.
    """

    handoff: bytes
    token: bytes
    receiver: bytes

    def __repr__(self) -> str:
        return f"Permit({self.handoff.hex()})"  # a token is in no log


def opens(token: bytes, session: bytes, handoff: bytes) -> bytes:
    """What the receiver shows when it opens the handoff."""
    return hmac.digest(token, b"open" + session + handoff, "sha256")


def begins(token: bytes, session: bytes, handoff: bytes, tokens: int, digest: int) -> bytes:
    """What the sender shows when it says which prompt it will send."""
    numbers = tokens.to_bytes(8, "big") + digest.to_bytes(8, "big")
    return hmac.digest(token, b"begin" + session + handoff + numbers, "sha256")


def seal_key(token: bytes, handoff: bytes, epoch: int) -> bytes:
    """What the digests of the handoff's blocks are bound to: who does not have the token cannot make one."""
    return hmac.digest(token, b"blocks" + handoff + epoch.to_bytes(8, "big"), "sha256")


def check(shown: bytes, expected: bytes, of: str) -> None:
    """Raises TransferError, `bad_token`."""
    if not hmac.compare_digest(shown, expected):
        raise TransferError(f"{of} does not have the token of this handoff", code="bad_token")
