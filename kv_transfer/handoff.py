"""What the prefill side tells the decode side about one prompt, as bytes that the frontend carries unread."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
import xxhash

from slipstream.errors import TransferError

VERSION = 1


class Handoff(msgspec.Struct, frozen=True, array_like=True):
    """One prompt's KV blocks, ready to be read.

    Attributes:
        board: file name of the prefill worker's lease board (no folder: readers look in their own).
        epoch: which start of the prefill worker; a restarted one has another.
        slot, nonce: the lease; valid while the board's slot holds this nonce.
        tokens: prompt tokens that the blocks cover, from the first one on.
        digest: of those token ids, so that blocks are never used for another prompt.
        block_ids: the prefill worker's blocks in prompt order; the last one may be partly filled.
    """

    version: int
    board: str
    epoch: int
    slot: int
    nonce: int
    tokens: int
    digest: int
    block_ids: list[int]


def digest_tokens(token_ids: Sequence[int]) -> int:
    """A 64-bit digest of a token sequence (xxh3 over 32-bit ids in this host's byte order)."""
    return xxhash.xxh3_64_intdigest(array("I", token_ids).tobytes())


def encode(handoff: Handoff) -> bytes:
    return msgspec.msgpack.encode(handoff)


def decode(raw: bytes) -> Handoff:
    """The handoff behind `raw`.

    Raises:
        TransferError: not a handoff, or of a version this build does not read.
    """
    try:
        handoff = msgspec.msgpack.decode(raw, type=Handoff)
    except msgspec.MsgspecError as error:
        raise TransferError(f"handoff of {len(raw)} bytes is not readable: {error}", code="bad_handoff") from error
    if handoff.version != VERSION:
        raise TransferError(
            f"handoff has version {handoff.version}, this worker reads {VERSION}: run one version on all workers",
            code="bad_handoff",
        )
    return handoff
