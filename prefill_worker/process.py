"""`slipstream prefill-worker`: a worker that begins in the prefill role."""

from __future__ import annotations

from engine import host_process
from prefill_worker.both_roles import add_services
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role


def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises what `host_process.run` raises."""
    host_process.run(settings, Role.ROLE_PREFILL, add_services)
