"""What `slipstream keys` does to a key file, as functions from one content to the next. The time is passed in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from frontend.keys.entries import KeyEntry, KeyFile
from frontend.keys.secret import NewKey
from slipstream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Made:
    """The content with a new key, and its entry."""

    content: KeyFile
    entry: KeyEntry


def created(content: KeyFile, wanted: KeyEntry, key: NewKey, now: datetime) -> Made:
    """With a new key.

    Args:
        wanted: all but its id, hash and time.
    """
    fields = {"id": key.key_id, "sha256": key.sha256, "account": "", "created": now, "revoked": None}
    return _with(content, _changed(wanted, **fields))


def rotated(content: KeyFile, key_id: str, key: NewKey, now: datetime, overlap: timedelta) -> Made:
    """With a new key for an old one, which may do the same and shares its rates; the old one goes on for `overlap`.

    Raises:
        ConfigError: there is no such key, or it is not valid any more.
    """
    old = content.entry(key_id)
    state = old.state(now)
    if state in ("revoked", "expired"):
        raise ConfigError(f"key {key_id} is {state}; create a new one")
    ends = now + overlap if old.expires is None else min(old.expires, now + overlap)
    lasts = None if old.expires is None or old.created is None else now + (old.expires - old.created)
    new = {"id": key.key_id, "sha256": key.sha256, "account": old.account or old.id, "created": now}
    replaced = _replaced(content, _changed(old, expires=ends))
    return _with(replaced, _changed(old, **new, not_before=None, expires=lasts))


def revoked(content: KeyFile, key_id: str, now: datetime) -> KeyFile:
    """With a key that is valid no more. It stays in the file, so that its id is known for what it was.

    Raises:
        ConfigError: there is no such key.
    """
    old = content.entry(key_id)
    return content if old.revoked is not None else _replaced(content, _changed(old, revoked=now))


def _changed(entry: KeyEntry, **fields: object) -> KeyEntry:
    return KeyEntry.model_validate({**dict(entry), **fields})


def _with(content: KeyFile, entry: KeyEntry) -> Made:
    grown = KeyFile(version=content.version, tenants=content.tenants, keys=(*content.keys, entry))
    return Made(grown, entry)


def _replaced(content: KeyFile, entry: KeyEntry) -> KeyFile:
    return content.model_copy(update={"keys": tuple(entry if one.id == entry.id else one for one in content.keys)})
