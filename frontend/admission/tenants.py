"""Whose request it is and in which class it goes: from an API key, headers (or gRPC metadata) and the body.

| name                  | says                                                                             |
|-----------------------|----------------------------------------------------------------------------------|
| authorization         | `Bearer KEY`; the tenant whose `key_sha256` fits, else the default tenant        |
| x-slipstream-tenant   | the tenant's name; only where no keys are configured, since anybody can write it |
| x-slipstream-class    | realtime, nearline or batch; not above the tenant's own class where keys are set |
| x-request-timeout-s   | seconds that the request may take                                                |
| service_tier (body)   | OpenAI's: `flex` is batch, `priority` is realtime, others leave the default      |

Where there is a key file (`security.keys_file`), `frontend.keys` has let the request in: then the tenant, its weight
and its classes are the key's, and a class that the key is not for is refused. Without one, the keys of
`admission.tenants` classify, and do not keep anybody out. A global frontend, which comes with
`x-slipstream-peer-key`, is refused where its key is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256

from frontend.admission.claim import DEFAULT_TENANT, Claim, Priority
from frontend.keys.guard import PEER_KEY_HEADER, Caller
from slipstream.errors import InvalidRequestError, PeerKeyError
from slipstream.settings import AdmissionSettings

CLASS_HEADER = "x-slipstream-class"
TENANT_HEADER = "x-slipstream-tenant"
TIMEOUT_HEADER = "x-request-timeout-s"
KEY_HEADER = "authorization"
PREFIX_HEADER = "x-slipstream-prefix"

_HTTP_NAMES = {
    name.encode(): name
    for name in (CLASS_HEADER, TENANT_HEADER, TIMEOUT_HEADER, KEY_HEADER, PEER_KEY_HEADER, PREFIX_HEADER)
}
_NAMES = frozenset(_HTTP_NAMES.values())
_CLASSES = {one.label: one for one in Priority}
_TIERS = {"flex": Priority.BATCH, "priority": Priority.REALTIME}
_SAFE_TENANT = re.compile(r"[A-Za-z0-9._:@-]{1,64}")


class Tenants:
    """The tenants of the settings. Use one of `of_http` and `of_grpc` for each request."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self._default_class = _CLASSES[settings.default_class]
        self._default = Claim(self._default_class)
        self._by_key = {
            one.key_sha256: Claim(_CLASSES[one.priority], one.name, one.weight)
            for one in settings.tenants
            if one.key_sha256 is not None
        }
        named = {one.name: one.weight for one in settings.tenants}
        if DEFAULT_TENANT in named:
            self._default = Claim(self._default_class, DEFAULT_TENANT, named[DEFAULT_TENANT])
        self.names = frozenset(named) | {DEFAULT_TENANT}
        self._peer_keys = frozenset((settings.peer_key_sha256 or "").split(",")) - {""}

    def check_peer(self, key: str) -> None:
        """Whether this is the key of a global frontend that may use the cluster.

        Raises:
            PeerKeyError: it is not.
        """
        if sha256(key.encode()).hexdigest() in self._peer_keys:
            return
        if not self._peer_keys:
            raise PeerKeyError("This cluster serves no global frontend; admission.peer_key_sha256 is not set there.")
        raise PeerKeyError(
            "This cluster does not know the global frontend's key: its SHA-256 is not in admission.peer_key_sha256."
        )

    def of_http(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        service_tier: str | None = None,
        caller: Caller | None = None,
    ) -> Claim:
        """From ASGI's raw headers, whose names are in lower case.

        Raises:
            InvalidRequestError: a header's value is wrong.
            NotAllowedError: the caller's key is not for the class.
            PeerKeyError: it comes from a global frontend whose key is not known.
        """
        said = {_HTTP_NAMES[name]: value.decode("latin-1") for name, value in headers if name in _HTTP_NAMES}
        return self._claim(said, service_tier, caller) if said or service_tier or caller else self._default

    def of_grpc(
        self, metadata: Iterable[tuple[str, str | bytes]], left_s: float | None, caller: Caller | None = None
    ) -> Claim:
        """From a call's metadata, and the seconds that the caller gives it.

        Raises:
            InvalidRequestError, NotAllowedError, PeerKeyError: as above.
        """
        said = {name: value for name, value in metadata if name in _NAMES and isinstance(value, str)}
        claim = self._claim(said, None, caller) if said or caller else self._default
        if left_s is None or left_s > _YEAR_S or (claim.timeout_s is not None and claim.timeout_s <= left_s):
            return claim
        return replace(claim, timeout_s=max(left_s, 0.0))

    def _claim(self, said: dict[str, str], service_tier: str | None, caller: Caller | None) -> Claim:
        timeout_s = timeout_of(said[TIMEOUT_HEADER]) if TIMEOUT_HEADER in said else None
        prefix = ""
        if PEER_KEY_HEADER in said:
            self.check_peer(said[PEER_KEY_HEADER])
            prefix = said.get(PREFIX_HEADER, "")
        if caller is not None:
            wanted = _class(said[CLASS_HEADER]) if CLASS_HEADER in said else _TIERS.get(service_tier or "")
            priority = caller.allowed_class(wanted, self._default_class)
            return Claim(priority, caller.key.tenant, caller.key.weight, timeout_s, prefix)
        known = self._by_key.get(_key_hash(said.get(KEY_HEADER, ""))) if self._by_key else None
        base = known or self._default
        tenant, weight = base.tenant, base.weight
        if not self._by_key and TENANT_HEADER in said:
            tenant, weight = _tenant(said[TENANT_HEADER]), 1.0
        priority = base.priority
        if CLASS_HEADER in said:
            priority = _class(said[CLASS_HEADER])
        elif service_tier:
            priority = _TIERS.get(service_tier, priority)
        if self._by_key:
            priority = max(priority, base.priority)  # a larger one goes later
        return Claim(priority, tenant, weight, timeout_s, prefix)


_YEAR_S = 366 * 86400.0


def _key_hash(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return sha256(key.strip().encode()).hexdigest() if scheme.lower() == "bearer" else ""


def _tenant(value: str) -> str:
    if not _SAFE_TENANT.fullmatch(value):
        raise InvalidRequestError(
            f"Invalid '{TENANT_HEADER}': a name is 1 to 64 letters, digits and . _ : @ -", param=TENANT_HEADER
        )
    return value


def _class(value: str) -> Priority:
    priority = _CLASSES.get(value.strip().lower())
    if priority is None:
        raise InvalidRequestError(
            f"Invalid '{CLASS_HEADER}': '{value[:64]}' is none of {', '.join(_CLASSES)}.", param=CLASS_HEADER
        )
    return priority


def timeout_of(value: str) -> float:
    """The seconds of a `x-request-timeout-s`.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidRequestError(
            f"Invalid '{TIMEOUT_HEADER}': '{value[:64]}' is not a number of seconds above 0.", param=TIMEOUT_HEADER
        )
    return timeout_s
