"""Keys for tests of the faces: one of each kind, and a guard that knows them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from frontend.keys.entries import KeyFile, parsed
from frontend.keys.guard import Guard
from frontend.keys.keyring import Keyring
from frontend.keys.ledger import Ledger
from frontend.keys.secret import NewKey, new_key


def entry(key: NewKey, **fields: Any) -> dict[str, Any]:
    return {"id": key.key_id, "sha256": key.sha256, **fields}


def content(*entries: dict[str, Any], **rest: Any) -> KeyFile:
    return parsed({"keys": list(entries), **rest}, "keys.yaml")


def guard_of(*entries: dict[str, Any], **rest: Any) -> Guard:
    return Guard(Keyring(content(*entries, **rest)), Ledger())


def bearer(key: NewKey) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.plain}"}


PAST = datetime(2020, 1, 1, tzinfo=UTC).isoformat()
FUTURE = datetime(2120, 1, 1, tzinfo=UTC).isoformat()

PLAIN, OBSERVER, BATCH, OTHER_MODEL, EXPIRED, REVOKED, EARLY, POOR, STRANGER = (new_key() for _ in range(9))


def usual_guard() -> Guard:
    return guard_of(
        entry(PLAIN, tenant="acme"),
        entry(OBSERVER, tenant="ops", scopes=["observe"]),
        entry(BATCH, tenant="crawler", classes=["batch"]),
        entry(OTHER_MODEL, models=["llama-*"]),
        entry(EXPIRED, expires=PAST),
        entry(REVOKED, revoked=PAST),
        entry(EARLY, not_before=FUTURE),
        entry(POOR, limits={"requests_per_minute": 2, "input_tokens_per_minute": 600, "output_tokens_per_minute": 60}),
        tenants=[{"name": "acme", "weight": 3}, {"name": "crawler", "priority": "batch"}],
    )
