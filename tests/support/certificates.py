"""Certificates for tests: a real authority of its own in each folder."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from slipstream.security.authority import Authority, make_everything
from slipstream.security.names import ComponentName, ComponentRole
from slipstream.security_settings import SecuritySettings


def an_authority(folder: Path, cluster: str = "test") -> SecuritySettings:
    """A whole set of certificates, and the settings that use it."""
    make_everything(folder, cluster, [], days=1.0, authority_days=2.0)
    return SecuritySettings(tls_folder=folder)


def an_expired_set(folder: Path, role: ComponentRole) -> SecuritySettings:
    """One whose certificate of that role ended an hour ago."""
    settings = an_authority(folder)
    authority = Authority.load(folder)
    name = ComponentName(authority.cluster, role, "any")
    authority.issue_component(name, days=1.0, now=datetime.now(UTC) - timedelta(days=1, hours=1))
    return settings


def a_token(path: Path, *tokens: str) -> SecuritySettings:
    """Settings with these cluster tokens."""
    path.write_text("".join(f"{token}\n" for token in tokens))
    return SecuritySettings(cluster_token_file=path)
