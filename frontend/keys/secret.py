"""Keys as clients hold them: `slp_<id>_<secret>`, made, taken apart, and compared.

    slp_k3v9x2m8q0ab_Zr0...        the id is no secret: it is in logs, metrics and the key file
    ^   ^            ^
    |   |            32 random bytes in base 62, and a CRC-32 of all before it
    |   12 characters of a-z and 0-9
    fixed, so that scanners for leaked credentials can look for `slp_[a-z0-9]{12}_[A-Za-z0-9]{49}` and tell a real key
    from a look-alike by its checksum, as GitHub's do

What is stored is the SHA-256 of the whole key. A password needs a slow, salted hash because it can be guessed; 256
random bits cannot, at any speed, so a fast hash gives nothing away and costs each request half a microsecond.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from hashlib import sha256
from zlib import crc32

PREFIX = "slp_"
ID_CHARACTERS = 12
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_BYTES = 32
_SECRET_CHARACTERS = 43  # 62 ** 43 > 2 ** 256
_CHECK_CHARACTERS = 6  # 62 ** 6 > 2 ** 32
KEY_PATTERN = rf"{PREFIX}[a-z0-9]{{{ID_CHARACTERS}}}_[A-Za-z0-9]{{{_SECRET_CHARACTERS + _CHECK_CHARACTERS}}}"
ID_PATTERN = rf"[a-z0-9]{{{ID_CHARACTERS}}}"
_KEY = re.compile(KEY_PATTERN)
LONGEST_CREDENTIAL = 512
"""Characters of what a client shows as a key; what is longer is none."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time that `plain` is known to us."""

    key_id: str
    plain: str

    def __repr__(self) -> str:
        return f"NewKey({self.key_id!r})"  # a traceback must not show it

    @property
    def sha256(self) -> str:
        """What is stored of it."""
        return digest(self.plain).hex()


def new_key() -> NewKey:
    """A key nobody has had before."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(ID_CHARACTERS))
    body = f"{PREFIX}{key_id}_{_base62(int.from_bytes(secrets.token_bytes(_SECRET_BYTES)), _SECRET_CHARACTERS)}"
    return NewKey(key_id, body + _checksum(body))


def id_of(credential: str) -> str | None:
    """The id of what looks like one of our keys; None for all else, mistyped keys among it."""
    if len(credential) > LONGEST_CREDENTIAL or not _KEY.fullmatch(credential):
        return None
    if _checksum(credential[:-_CHECK_CHARACTERS]) != credential[-_CHECK_CHARACTERS:]:
        return None
    return credential[len(PREFIX) : len(PREFIX) + ID_CHARACTERS]


def digest(credential: str) -> bytes:
    """What is compared with what is stored."""
    return sha256(credential.encode("utf-8", "surrogateescape")).digest()


def same(one: bytes, other: bytes) -> bool:
    """Whether two digests are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one, other)


def _checksum(body: str) -> str:
    return _base62(crc32(body.encode()), _CHECK_CHARACTERS)


def _base62(number: int, characters: int) -> str:
    out = []
    for _ in range(characters):
        number, place = divmod(number, 62)
        out.append(_BASE62[place])
    return "".join(reversed(out))
