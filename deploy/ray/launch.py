"""`slipstream up --on ray`: control plane, pool and frontend are processes here, the workers are on Ray's nodes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from deploy import readiness
from deploy.launch import launch
from deploy.plan import (
    CONTROL_PLANE,
    FRONTEND,
    STAGE_WORKERS,
    Commands,
    PlannedCluster,
    resolve_ports,
    state_folder,
)
from deploy.ray.process import COMPONENT as POOL
from deploy.supervisor import Report
from slipstream import model_folder
from slipstream.addresses import host_port
from slipstream.errors import ConfigError
from slipstream.security.authority import new_token, write_secret
from slipstream.security.identity import component_files
from slipstream.security.names import ComponentRole
from slipstream.security.servers import is_loopback
from slipstream.settings import ControlPlaneSettings, Settings
from slipstream.v1.registry_pb2 import Role

T = TypeVar("T")

_DRAIN_MARGIN_S = 30.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ANYWHERE = ("8.8.8.8", 53)
"""Nothing is sent there: it is a far address, so that the kernel says which of ours is towards it (as Ray does)."""


def plan(
    settings: Settings,
    *,
    environ: Mapping[str, str],
    run_folder: Path,
    python: str = sys.executable,
    home: Path | None = None,
) -> PlannedCluster:
    """Decide everything, and write the run folder's `slipstream.yaml`.

    Raises:
        ConfigError: a port is taken, or the number of workers that a planner may start is not said.
        StartupError: the run folder cannot be written.
    """
    if settings.cluster.autoscale and settings.cluster.max_workers is None:
        raise ConfigError(
            "cluster.max_workers: with --autoscale on Ray say how many workers there may be (--max-workers)",
            param="cluster.max_workers",
        )
    if settings.served_model_name is None:
        # Said once, here: the nodes may have the model's folder elsewhere, and call it otherwise.
        name = model_folder.resolve(settings.model, weights=False).served_name
        settings = settings.model_copy(update={"served_model_name": name})
    control = _reachable(settings.control_plane, settings.ray.address)
    closed = _closed(settings, control.host, token_file(environ, home or Path.home(), settings.cluster.name))
    resolved = resolve_ports(closed.model_copy(update={"control_plane": control}))
    commands = Commands.of(resolved, environ, run_folder, python)
    pool = commands.component(
        POOL,
        ["--run-folder", str(run_folder)],
        program=(python, "-P", "-m", "deploy.ray.process"),
        stop_stage=STAGE_WORKERS,
        essential=True,
    )
    return PlannedCluster(resolved, (commands.control_plane(), pool, commands.frontend()), run_folder)


async def launch_on_ray(cluster: PlannedCluster, body: Callable[[], Coroutine[Any, Any, T]], *, console: Console) -> T:
    """`launch` for a cluster whose workers are on Ray: ready means that so many are, and the frontend."""
    settings = cluster.settings
    wanted = {Role.ROLE_PREFILL: settings.cluster.prefill, Role.ROLE_DECODE: settings.cluster.decode}

    async def until_ready(report: Report) -> None:
        await readiness.until_ready(
            registry=settings.control_plane.address,
            frontend_url=cluster.http_url,
            enough=readiness.counted(wanted, POOL, report),
            control_plane=CONTROL_PLANE,
            frontend=FRONTEND,
            report=report,
        )

    return await launch(
        cluster.components,
        until_ready,
        body,
        console=console,
        ready_timeout_s=settings.cluster.ready_timeout_s,
        stop_timeout_s=settings.frontend.drain_timeout_s + settings.worker.drain_timeout_s + _DRAIN_MARGIN_S,
    )


def token_file(environ: Mapping[str, str], home: Path, cluster: str) -> Path:
    """Where the token of a cluster on Ray is kept: a later `up` of that name takes its workers over, and needs it."""
    return state_folder(environ, home) / "ray" / f"{cluster}.token"


def _closed(settings: Settings, host: str, token: Path) -> Settings:
    """With a token that all components share, unless they are protected, or shall not be."""
    security = settings.security
    protected = component_files(security, ComponentRole.CONTROL_PLANE) or security.cluster_token_file
    if protected or security.allow_insecure or is_loopback(host_port(host, 0)):
        return settings
    if not token.exists():
        write_secret(token, f"{new_token()}\n")
    security = security.model_copy(update={"cluster_token_file": token})
    return settings.model_copy(update={"security": security})


def _reachable(control: ControlPlaneSettings, ray_address: str | None) -> ControlPlaneSettings:
    """Where other nodes find the control plane: on the address that is towards Ray's head, unless one is set."""
    if control.host not in _LOOPBACK:
        return control
    host, _, port = (ray_address or "").rpartition(":")
    towards = (host.strip("[]"), int(port)) if host and port.isdigit() else _ANYWHERE
    return control.model_copy(update={"host": _own_address(towards)})


def _own_address(towards: tuple[str, int]) -> str:
    family = socket.AF_INET6 if ":" in towards[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(towards)
        except OSError:  # no network at all: then there is only this machine
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address
