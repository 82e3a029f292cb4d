"""Who shares computed prompts: the salt under which a request's KV blocks are cached.

A prompt whose beginning is cached is answered sooner, so that anybody who shares a cache can find out by asking what
others have asked (its timing is a side channel; `usage` even tells how many tokens were cached). Engines find blocks
by tokens and salt together, and so do the router's index and the workers' feeds: another salt, another cache.
"""

from __future__ import annotations

from hashlib import sha256

from slipstream.errors import InvalidRequestError

LONGEST_SALT = 256
"""Characters of a client's own salt."""


def salt_of(tenant: str, asked: str) -> str:
    """The salt of a request; empty for the cache that all share.

    Args:
        tenant: whose cache it is; empty where tenants share one.
        asked: by which the client keeps it apart further. It cannot be made to fit another tenant's.
    """
    if not tenant and not asked:
        return ""
    return sha256(f"{len(tenant)}:{tenant}:{asked}".encode()).hexdigest()[:32]


def checked_salt(asked: str) -> str:
    """A client's own salt.

    Raises:
        InvalidRequestError: it is too long.
    """
    if len(asked) > LONGEST_SALT:
        raise InvalidRequestError(
            f"Invalid 'cache_salt': {len(asked)} characters, at most {LONGEST_SALT} are allowed.", param="cache_salt"
        )
    return asked
