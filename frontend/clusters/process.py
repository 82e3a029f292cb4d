"""The process of a global frontend: uvloop.run(serve(settings))."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Callable

from frontend.clusters import watch
from frontend.clusters.fleet import ClusterFleet
from frontend.clusters.grpc_face import GlobalGrpcFace
from frontend.clusters.http_face import create_app
from frontend.keys.guard import Guard
from frontend.keys.opening import guarding
from frontend.process import (
    BACKLOG_CONNECTIONS,
    bind_grpc,
    bound_socket,
    http_server,
    raise_file_limit,
    stop_signals,
)
from slipstream import cycle_collector, exposure, grpc_wakeups, telemetry
from slipstream.addresses import host_port
from slipstream.background import background
from slipstream.errors import ConfigError
from slipstream.security import identity
from slipstream.security.names import ComponentRole
from slipstream.settings import Settings

log = telemetry.get_logger(__name__)


async def serve(settings: Settings, listening: Callable[[str, str], None] = lambda http, grpc: None) -> None:
    """Run both faces until SIGTERM or SIGINT, then let open requests finish for `frontend.drain_timeout_s`.

    Args:
        listening: called with the HTTP and the gRPC address once both accept.

    Raises:
        ConfigError: there are no clusters, or what is said of one is wrong.
        StartupError: a port is taken.
    """
    if not settings.global_frontend.clusters:
        raise ConfigError(
            "global_frontend.clusters is empty: name the clusters in the file of --config (docs/global-frontend.md)"
        )
    exposure.check_faces(settings)
    raise_file_limit()
    grpc_wakeups.install()
    identity.install(settings.security, ComponentRole.FRONTEND)
    with (
        stop_signals() as stop,
        bound_socket(settings.frontend) as http_socket,
        contextlib.closing(ClusterFleet(settings.global_frontend, uuid.uuid4().hex)) as fleet,
    ):
        cycle_collector.look_seldom()
        async with (
            background(watch.follow(fleet), name="watch clusters"),
            guarding(settings, counts_tokens=False) as guard,
        ):
            await _run_faces(settings, fleet, http_socket, stop, listening, guard)


async def _run_faces(
    settings: Settings,
    fleet: ClusterFleet,
    http_socket: socket.socket,
    stop: asyncio.Event,
    listening: Callable[[str, str], None],
    guard: Guard | None,
) -> None:
    faces = settings.frontend
    app = create_app(
        fleet,
        max_body_bytes=faces.max_body_bytes,
        body_timeout_s=settings.limits.body_timeout_s,
        request_timeout_s=faces.request_timeout_s,
        draining=stop.is_set,
        guard=guard,
    )
    grpc_face = GlobalGrpcFace(
        fleet,
        max_message_bytes=faces.max_body_bytes,
        request_timeout_s=faces.request_timeout_s,
        limits=settings.limits,
        guard=guard,
    )
    grpc_port = bind_grpc(grpc_face.server, faces)
    server = http_server(app, faces, settings.limits)
    http_socket.listen(BACKLOG_CONNECTIONS)
    try:
        await grpc_face.start()
        async with asyncio.TaskGroup() as tasks:
            http_task = tasks.create_task(server.serve([http_socket]), name="http face")
            http_address = host_port(faces.host, http_socket.getsockname()[1])
            grpc_address = host_port(faces.host, grpc_port)
            clusters = sorted({one.known.cluster for one in fleet.members})
            log.info("global_frontend_listening", http=http_address, grpc=grpc_address, clusters=clusters)
            listening(http_address, grpc_address)
            await stop.wait()
            log.info("global_frontend_draining", timeout_s=faces.drain_timeout_s)
            server.should_exit = True
            await grpc_face.stop(faces.drain_timeout_s)
            await http_task
    finally:
        await grpc_face.stop(0)
    log.info("global_frontend_stopped")
