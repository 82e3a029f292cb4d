"""Whether the public faces may listen where they shall: not where other machines reach them without a key, unless
somebody said so."""

from __future__ import annotations

from slipstream import telemetry
from slipstream.addresses import host_port
from slipstream.errors import StartupError
from slipstream.security.servers import is_loopback
from slipstream.settings import Settings

log = telemetry.get_logger(__name__)


def check_faces(settings: Settings) -> None:
    """Whether these faces may listen there.

    Raises:
        StartupError: other machines could use them without a key, and nobody said that they may.
    """
    host, security = settings.frontend.host, settings.security
    if security.keys_file is not None or is_loopback(host_port(host, settings.frontend.http_port)):
        return
    if not security.anonymous:
        raise StartupError(
            f"frontend.host = {host} can be reached from other machines, and there are no API keys: whoever reaches "
            "it could use the cluster. Name a key file (security.keys_file; `slipstream keys create` makes one), "
            "listen on 127.0.0.1, or permit it with security.anonymous = true (--security-anonymous)."
        )
    log.warning("frontend_open_to_everybody", host=host, remedy="security.keys_file; see docs/security/api-keys.md")
