"""What names one prompt's transfer, and what binds its bytes to it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
import xxhash

from kv_transfer.identity import KEY_BYTES
from kv_transfer.permits import TOKEN_BYTES, seal_key
from slipstream.errors import TransferError

ID_BYTES = 16


class Handoff(msgspec.Struct, frozen=True, array_like=True):
    """Where a prompt's blocks come from.

    Attributes:
        id: random, made for one pair of calls.
        address: host:port of the sender's transfer agent; of the first one where it has several ranks.
        epoch: of the sender's process; a restarted one has another, and is never taken for this one.
        key: the public key of the sender's agent, or of all its ranks' agents.
        token: see `permits`; only who was told it can receive the blocks.
        ranks: addresses of the agents of all its tensor-parallel ranks, in order; empty where there is only one.
    """

    id: bytes
    address: str
    epoch: int
    key: bytes
    token: bytes
    ranks: tuple[str, ...] = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of its ranks' agents, in order."""
        return self.ranks or (self.address,)

    def __repr__(self) -> str:
        return f"Handoff({self.id.hex()}, {self.address!r}, {self.epoch})"  # a token is in no log


def check(handoff: Handoff) -> Handoff:
    """The same handoff, if it is well formed.

    Raises:
        TransferError: `bad_handoff`.
    """
    unreachable = [address for address in handoff.addresses if ":" not in address]
    if len(handoff.id) != ID_BYTES or unreachable or not 0 <= handoff.epoch < 1 << 64:
        raise TransferError(
            f"a handoff has an id of {ID_BYTES} bytes, addresses host:port and an epoch of 64 bits, got "
            f"{len(handoff.id)} bytes, {', '.join(map(repr, handoff.addresses))} and {handoff.epoch}",
            code="bad_handoff",
        )
    if len(handoff.key) != KEY_BYTES or len(handoff.token) != TOKEN_BYTES:
        raise TransferError(
            f"a handoff has the sender's key of {KEY_BYTES} bytes and a token of {TOKEN_BYTES}, got "
            f"{len(handoff.key)} and {len(handoff.token)}",
            code="bad_token",
        )
    return handoff


def digest_tokens(token_ids: Sequence[int]) -> int:
    """A 64-bit digest of a token sequence (xxh3 over 32-bit ids in this host's byte order)."""
    return xxhash.xxh3_64_intdigest(array("I", token_ids).tobytes())


class Seal:
    """Digests of block bytes, bound to a handoff, its token, the sender's incarnation and the place in the prompt.

    xxh3 with a seed made of all of them: the same bytes under another id, token, epoch, shard, block or region have
    another digest. It guards against mistakes and accidents of memory and network. The seed is secret, but xxh3 is no
    MAC: it makes a forger's work hard, not impossible.

    Args:
        shard: which part of the KV heads it is, where they are divided among tensor-parallel ranks.
    """

    def __init__(self, handoff_id: bytes, epoch: int, token: bytes, shard: int = 0) -> None:
        key = seal_key(token, handoff_id, epoch)
        self._base = xxhash.xxh3_64_intdigest(key + shard.to_bytes(4, "little"))

    def digest(self, data: memoryview, block: int, region: int) -> int:
        """Of one piece: the bytes of block `block` of the prompt in region `region`."""
        # Odd multipliers (2**64 over the golden ratio; a prime of xxHash): neighbours get unrelated seeds.
        place = block * 0x9E3779B97F4A7C15 + region * 0xC2B2AE3D27D4EB4F
        return xxhash.xxh3_64_intdigest(data, (self._base + place) & 0xFFFF_FFFF_FFFF_FFFF)
