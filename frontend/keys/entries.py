"""The key file's content: one entry a key, with the key's hash and never the key itself."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator

from frontend.admission.claim import DEFAULT_TENANT
from frontend.keys.secret import ID_PATTERN
from slipstream.errors import ConfigError
from slipstream.settings_section import Section

ClassName = Literal["realtime", "nearline", "batch"]
ScopeName = Literal["inference", "observe"]
CLASSES: tuple[ClassName, ...] = ("realtime", "nearline", "batch")
_TENANT = r"^[A-Za-z0-9._:@-]{1,64}$"
MAX_KEYS = 10_000

Moment = Annotated[AwareDatetime, AfterValidator(lambda one: one.astimezone(UTC).replace(microsecond=0))]
"""A time with its zone, in whole seconds."""
ModelPattern = Annotated[str, Field(min_length=1, max_length=200)]
Tokens = Annotated[int, Field(ge=1, le=10**12)]


class Limits(Section):
    """How much a key may have; what is absent is not limited."""

    requests_per_minute: Tokens | None = None
    input_tokens_per_minute: Tokens | None = None
    output_tokens_per_minute: Tokens | None = None
    burst_s: float = Field(60.0, ge=1, le=3600)
    """Seconds' worth of a rate that may come at once after a quiet time."""
    reserve_output_tokens: int = Field(512, ge=1, le=1 << 20)
    """Held of the output rate for an answer for which the client names no limit; what it really was is charged."""
    streams: int | None = Field(None, ge=1, le=1 << 20)
    """Requests answered at the same time."""
    connections: int | None = Field(None, ge=1, le=1 << 20)


class KeyEntry(Section):
    """One key.

    Attributes:
        name: for people.
        account: the key with which it shares its rates: the first of those that were rotated into each other.
        models: names, in which `*` stands for anything.
        not_before, expires, revoked: it is valid from the first until the earlier of the other two.
    """

    id: str = Field(pattern=f"^{ID_PATTERN}$")
    tenant: str = Field(DEFAULT_TENANT, pattern=_TENANT)
    name: str = Field("", max_length=200)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    account: str = Field("", pattern=f"^({ID_PATTERN})?$")
    scopes: tuple[ScopeName, ...] = ("inference",)
    models: tuple[ModelPattern, ...] = ("*",)
    classes: tuple[ClassName, ...] = CLASSES
    limits: Limits = Limits()
    created: Moment | None = None
    not_before: Moment | None = None
    expires: Moment | None = None
    revoked: Moment | None = None

    def state(self, now: datetime) -> str:
        """`valid`, or why it is not."""
        if self.revoked is not None and self.revoked <= now:
            return "revoked"
        if self.expires is not None and self.expires <= now:
            return "expired"
        if self.not_before is not None and now < self.not_before:
            return "not_yet_valid"
        return "valid"


class TenantEntry(Section):
    """What a tenant's requests may claim at admission, whichever of its keys they come with."""

    name: str = Field(pattern=_TENANT)
    weight: float = Field(1.0, gt=0, le=1e6)
    priority: ClassName = "realtime"


class KeyFile(Section):
    """All of a key file."""

    version: Literal[1] = 1
    tenants: tuple[TenantEntry, ...] = ()
    keys: tuple[KeyEntry, ...] = Field((), max_length=MAX_KEYS)

    @model_validator(mode="after")
    def _once(self) -> KeyFile:
        for what, names in (
            ("tenants: name", [one.name for one in self.tenants]),
            ("keys: id", [one.id for one in self.keys]),
            ("keys: sha256", [one.sha256 for one in self.keys]),
        ):
            seen: set[str] = set()
            for name in names:
                if name in seen:
                    raise ValueError(f"{what} {name} is there twice")
                seen.add(name)
        return self

    def entry(self, key_id: str) -> KeyEntry:
        """The key of that id.

        Raises:
            ConfigError: there is none.
        """
        for one in self.keys:
            if one.id == key_id:
                return one
        raise ConfigError(f"there is no key {key_id!r}; `slipstream keys list` shows those that are there")


def parsed(content: object, name: str) -> KeyFile:
    """Checked.

    Raises:
        ConfigError: a line for each thing that is wrong. Values are not shown: one may be a key that somebody put where
            its hash belongs.
    """
    try:
        return KeyFile.model_validate({} if content is None else content)
    except ValidationError as error:
        wrong = [f"{name}: {_place(one['loc'])}: {one['msg']}" for one in error.errors(include_input=False)]
        raise ConfigError("\n".join(_KEY_LIKE.sub("slp_...", line) for line in wrong)) from None


_KEY_LIKE = re.compile(r"slp_[A-Za-z0-9_]+")


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "the file"
