"""What `security` says of API keys. What is done with it is in `frontend.keys`; see docs/security/api-keys.md."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slipstream.settings_section import Section


class ApiKeySettings(Section):
    """The part of the section `security` that is about API keys."""

    keys_file: Path | None = Field(
        None,
        description="file of API keys, made by `slipstream keys`; with it frontends answer nobody without one, health "
        "checks apart. Reread when it changes",
    )
    keys_check_s: float = Field(1.0, ge=0.05, le=3600, description="between two looks whether the key file changed")
    observe_needs_key: bool = Field(
        True,
        description="with a key file, let only keys with the scope `observe` read /metrics and /slipstream/v1/* of a "
        "frontend",
    )
    anonymous: bool = Field(
        False,
        description="let frontends listen on addresses that other machines reach although there is no key file, so "
        "that whoever reaches them may use them",
    )
