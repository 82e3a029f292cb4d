"""The keys of one reading of the file, as a frontend uses them: found by what a client shows, and never changed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from frontend.admission.claim import Priority
from frontend.keys import secret
from frontend.keys.bucket import Rate
from frontend.keys.entries import CLASSES, KeyEntry, KeyFile, Limits, TenantEntry
from slipstream.errors import InvalidApiKeyError
from slipstream.settings import TenantSettings

_CLASSES = {one.label: one for one in Priority}
_FOREVER = float("inf")
_NOBODY = bytes(32)

TENANT_KEY = "tenant:"
"""Before the tenant's name: the id of a key that is in `admission.tenants` and not in the file."""


@dataclass(frozen=True, slots=True)
class Rates:
    """A key's limits; None is no limit."""

    requests: Rate | None = None
    input_tokens: Rate | None = None
    output_tokens: Rate | None = None
    reserve_output_tokens: int = 512
    streams: int | None = None
    connections: int | None = None

    @classmethod
    def of(cls, limits: Limits) -> Rates:
        def rate(per_minute: int | None) -> Rate | None:
            if per_minute is None:
                return None
            # Less than one could never be had.
            return Rate(per_minute / 60, max(1.0, per_minute / 60 * limits.burst_s))

        return cls(
            rate(limits.requests_per_minute),
            rate(limits.input_tokens_per_minute),
            rate(limits.output_tokens_per_minute),
            limits.reserve_output_tokens,
            limits.streams,
            limits.connections,
        )


NO_RATES = Rates()


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Attributes:
        account: under which its rates are kept.
        classes: those it may ask for, the highest first; the tenant's own priority is the highest there is.
        models: what matches the names of the models it may use; None for all.
        valid_from_s, valid_until_s: Unix time.
    """

    key_id: str
    digest: bytes = field(repr=False)
    tenant: str
    account: str
    weight: float = 1.0
    scopes: frozenset[str] = frozenset(("inference",))
    classes: tuple[Priority, ...] = tuple(Priority)
    models: re.Pattern[str] | None = None
    rates: Rates = NO_RATES
    valid_from_s: float = 0.0
    valid_until_s: float = _FOREVER
    revoked: bool = False

    def may_use(self, model: str) -> bool:
        return self.models is None or self.models.fullmatch(model) is not None


class RefusedKeyError(InvalidApiKeyError):
    """Attributes:
    reason: for the metric.
    key_id: of the key, if the client showed that it has it.
    """

    def __init__(self, message: str, reason: str, key_id: str = "") -> None:
        super().__init__(message)
        self.reason, self.key_id = reason, key_id


class Keyring:
    """Finds the key that a client has.

    Args:
        tenants: of `admission.tenants`: their weights and priorities, and the keys that some of them have there.
    """

    def __init__(self, content: KeyFile, tenants: Iterable[TenantSettings] = ()) -> None:
        settings = tuple(tenants)
        by_name = {one.name: TenantEntry(name=one.name, weight=one.weight, priority=one.priority) for one in settings}
        by_name |= {one.name: one for one in content.tenants}
        self.tenants = by_name
        self._by_id = {one.id: _key(one, by_name.get(one.tenant)) for one in content.keys}
        self._by_digest = {
            bytes.fromhex(one.key_sha256): _tenant_key(one) for one in settings if one.key_sha256 is not None
        }
        self.accounts = frozenset(one.account for one in (*self._by_id.values(), *self._by_digest.values()))

    def __len__(self) -> int:
        return len(self._by_id) + len(self._by_digest)

    def by_id(self, key_id: str) -> Key | None:
        return self._by_id.get(key_id)

    def find(self, credential: str, unix_s: float) -> Key:
        """The key that this is.

        Raises:
            RefusedKeyError: it is none, or none that is valid now.
        """
        digest = secret.digest(credential) if len(credential) <= secret.LONGEST_CREDENTIAL else _NOBODY
        key_id = secret.id_of(credential)
        key = self._by_digest.get(digest) if key_id is None else self._by_id.get(key_id)
        # The same work for ids that are and that are not, so that the time does not tell them apart.
        if not secret.same(digest, key.digest if key is not None else _NOBODY) or key is None:
            reason = "malformed" if key_id is None else "unknown" if key is None else "wrong_secret"
            raise RefusedKeyError("Incorrect API key provided: this server does not know it.", reason)
        if key.revoked:
            raise RefusedKeyError(f"The API key {key.key_id} was revoked.", "revoked", key.key_id)
        if unix_s >= key.valid_until_s:
            raise RefusedKeyError(f"The API key {key.key_id} has expired.", "expired", key.key_id)
        if unix_s < key.valid_from_s:
            raise RefusedKeyError(f"The API key {key.key_id} is not valid yet.", "not_yet_valid", key.key_id)
        return key


def model_pattern(patterns: Iterable[str]) -> re.Pattern[str] | None:
    """What matches names by any of these, in which `*` stands for anything; None where one of them is for all."""
    wanted = list(patterns)
    if "*" in wanted:
        return None
    either = "|".join(".*".join(re.escape(part) for part in re.split(r"\*+", one)) for one in wanted)
    return re.compile(either or r"(?!)", re.DOTALL)


def _key(entry: KeyEntry, tenant: TenantEntry | None) -> Key:
    highest = _CLASSES[tenant.priority] if tenant is not None else Priority.REALTIME
    return Key(
        key_id=entry.id,
        digest=bytes.fromhex(entry.sha256),
        tenant=entry.tenant,
        account=entry.account or entry.id,
        weight=tenant.weight if tenant is not None else 1.0,
        scopes=frozenset(entry.scopes),
        classes=tuple(_CLASSES[name] for name in CLASSES if name in entry.classes and _CLASSES[name] >= highest),
        models=model_pattern(entry.models),
        rates=Rates.of(entry.limits),
        valid_from_s=entry.not_before.timestamp() if entry.not_before is not None else 0.0,
        valid_until_s=entry.expires.timestamp() if entry.expires is not None else _FOREVER,
        revoked=entry.revoked is not None,
    )


def _tenant_key(tenant: TenantSettings) -> Key:
    assert tenant.key_sha256 is not None, "only those with a key"
    return Key(
        key_id=f"{TENANT_KEY}{tenant.name}",
        digest=bytes.fromhex(tenant.key_sha256),
        tenant=tenant.name,
        account=f"{TENANT_KEY}{tenant.name}",
        weight=tenant.weight,
        classes=tuple(one for one in Priority if one >= _CLASSES[tenant.priority]),
    )
