"""The cluster's name for a KV block: one 64-bit number for a block and everything before it.

Workers and frontends compute the same key from the same tokens, so that blocks can be spoken of without their
tokens. A key is chained: it covers the model, the block size and all tokens up to the block's end. xxh3 is not
cryptographic; a collision costs a worse routing decision and nothing else, since engines match by their own hashes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

_ITEM = array("I").itemsize


def root_key(model: str, block_tokens: int, salt: str = "") -> int:
    """The key before the first block.

    Args:
        salt: keeps apart whose prefix caches must not be shared; empty for those that share.
    """
    return xxh3_64_intdigest(f"{model}/{block_tokens}/{salt}".encode())


def extend(parent: int, token_ids: Sequence[int], block_tokens: int) -> list[int]:
    """Keys of the whole blocks of `token_ids`, which follow the block with the key `parent`; a rest has none."""
    tokens = token_ids if isinstance(token_ids, array) else array("I", token_ids)
    data = tokens.tobytes()
    size = block_tokens * _ITEM
    keys = []
    for start in range(0, len(data) - size + 1, size):
        parent = xxh3_64_intdigest(data[start : start + size], parent)
        keys.append(parent)
    return keys
