"""Roles, and how a certificate says what it is for.

    URI   spiffe://slipstream/CLUSTER/ROLE/NAME     whose it is: servers look at it
    DNS   ROLE.CLUSTER.slipstream.internal          what clients demand of who answers

Addresses of workers come and go, so that no certificate names any: a client demands the role and the cluster instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from slipstream.errors import ConfigError

TRUST_DOMAIN = "slipstream"
_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_CLUSTER = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class ComponentRole(StrEnum):
    """What a process is to the others."""

    CONTROL_PLANE = "control-plane"
    WORKER = "worker"
    FRONTEND = "frontend"
    LAUNCHER = "launcher"
    """`slipstream up`: it starts workers, and follows the registry."""
    OPERATOR = "operator"
    """A person with the command line."""
    METRICS = "metrics"
    """What reads /metrics, and may do nothing else."""


COMPONENTS = tuple(ComponentRole)


@dataclass(frozen=True, slots=True)
class ComponentName:
    """Whose a certificate is."""

    cluster: str
    role: ComponentRole
    name: str

    @property
    def uri(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/{self.cluster}/{self.role}/{self.name}"

    @property
    def dns(self) -> str:
        return server_name(self.cluster, self.role)

    def __str__(self) -> str:
        return f"{self.role} {self.name} of cluster {self.cluster}"


def server_name(cluster: str, role: ComponentRole) -> str:
    """What a client demands of the certificate of who answers."""
    return f"{role}.{cluster}.slipstream.internal"


def component_name(cluster: str, role: str, name: str) -> ComponentName:
    """A name for a new certificate.

    Raises:
        ConfigError: it cannot be one.
    """
    if role not in COMPONENTS:
        raise ConfigError(f"role = {role}: there are {', '.join(COMPONENTS)}", param="role")
    if not _CLUSTER.fullmatch(cluster):
        raise ConfigError(
            f"cluster = {cluster}: 1 to 63 small letters, digits and - are a cluster's name", param="cluster"
        )
    if not _PART.fullmatch(name):
        raise ConfigError(f"name = {name}: 1 to 63 letters, digits and . _ - are a component's name", param="name")
    return ComponentName(cluster, ComponentRole(role), name)


def parse_uri(uri: str) -> ComponentName | None:
    """Whose a certificate with this URI is; None when it is nobody's of ours."""
    scheme, _, rest = uri.partition("://")
    parts = rest.split("/")
    if scheme != "spiffe" or len(parts) != 4 or parts[0] != TRUST_DOMAIN:
        return None
    _, cluster, role, name = parts
    if role not in COMPONENTS or not _CLUSTER.fullmatch(cluster) or not _PART.fullmatch(name):
        return None
    return ComponentName(cluster, ComponentRole(role), name)
