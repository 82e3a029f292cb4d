"""The control plane's process: one gRPC server with the registry, the planner, health checks and reflection.

It may be killed at any time: see `planner.registry` for why nothing is lost.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client.registry import Collector

from planner.fence_keeper import FenceKeeper
from planner.fence_metrics import FenceCollector
from planner.live import FindProfile, OpenScaler, open_planner
from planner.loop_metrics import PlannerCollector
from planner.metrics import serving_metrics
from planner.planner_service import LivePlanner, PlannerService
from planner.service import RegistryService
from planner.what_if import WhatIf
from slipstream import telemetry
from slipstream.addresses import host_port
from slipstream.background import background
from slipstream.errors import StartupError
from slipstream.grpc_channels import server_options
from slipstream.loop_tasks import LoopTasks
from slipstream.security import audit, identity
from slipstream.security.names import ComponentRole
from slipstream.security.servers import create_server, listen
from slipstream.settings import ControlPlaneSettings, Settings
from slipstream.v1 import planner_pb2, registry_pb2
from slipstream.v1.planner_pb2_grpc import add_PlannerServicer_to_server
from slipstream.v1.registry_pb2_grpc import add_RegistryServicer_to_server

log = telemetry.get_logger(__name__)

MAX_REQUEST_BYTES = 256 << 10
"""Room for a policy of 256 models; records are far smaller (`planner.record_check`). Larger ones are not parsed."""
STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """A running control plane.

    Attributes:
        address: host:port it listens on, with the port that was really taken.
        metrics_url: of its own /metrics.
        publishing: ends only when the service is broken.
    """

    address: str
    metrics_url: str
    service: RegistryService
    publishing: asyncio.Task[None]


async def serve(
    settings: Settings,
    find_profile: FindProfile = Path,
    *,
    simulator: Sequence[str] = (),
    scalers: Mapping[str, OpenScaler] = MappingProxyType({}),
) -> None:
    """Run the control plane until SIGTERM or SIGINT, with the planner where the settings have a policy.

    Args:
        find_profile: where the profiles are that policies name.
        simulator: the command that answers `planner.what_if`.
        scalers: by what `planner.scaler` may name instead of an address.

    Raises:
        StartupError: the address cannot be listened on.
        ConfigError: the policy cannot be read, or cannot be followed.
    """
    telemetry.configure(settings.log, component="control-plane")
    audit.configure(settings.log.audit_log, "control-plane")
    identity.install(settings.security, ComponentRole.CONTROL_PLANE)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with AsyncExitStack() as stack:
            service, live, metrics = RegistryService(settings.control_plane.lease_s), None, list[Collector]()
            if settings.planner.policy is not None:
                live = await stack.enter_async_context(
                    open_planner(
                        settings.planner, lambda: service.posted, find_profile, scalers, health=settings.health
                    )
                )
                metrics.append(PlannerCollector(live))
            keeper = None
            if settings.planner.follow is None:  # else the registry is another process', and so is its keeper
                keeper = FenceKeeper(settings.health, lambda: service.posted)
                metrics.append(FenceCollector(keeper))
                await stack.enter_async_context(background(keeper.follow(), name="fence"))
            plane = await stack.enter_async_context(
                open_control_plane(
                    settings.control_plane,
                    live,
                    service=service,
                    metrics=metrics,
                    what_if=WhatIf(simulator),
                    keeper=keeper,
                )
            )
            stopping = await stack.enter_async_context(background(_wait(stop), name="stop"))
            await asyncio.wait({stopping, plane.publishing}, return_when=asyncio.FIRST_COMPLETED)
            log.info("control_plane_stopping", address=plane.address)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@asynccontextmanager
async def open_control_plane(
    settings: ControlPlaneSettings,
    live: LivePlanner | None = None,
    *,
    service: RegistryService | None = None,
    metrics: Iterable[Collector] = (),
    what_if: WhatIf | None = None,
    keeper: FenceKeeper | None = None,
) -> AsyncIterator[ControlPlane]:
    """Serve the registry while the body runs, and the planner where there is one.

    Args:
        service: the registry's, where somebody else looks at it too.
        metrics: that its /metrics shows besides its own.
        what_if: answers questions to the simulator.
        keeper: hears what frontends saw of the workers' speed.

    Raises:
        StartupError: the address cannot be listened on.
    """
    server = create_server(server_options(max_receive_bytes=MAX_REQUEST_BYTES))
    service = service or RegistryService(settings.lease_s)
    add_RegistryServicer_to_server(service, server)
    planner = PlannerService(live, what_if, keeper.take_report if keeper is not None else None)
    add_PlannerServicer_to_server(planner, server)
    names = [
        registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name,
        planner_pb2.DESCRIPTOR.services_by_name["Planner"].full_name,
    ]
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = host_port(settings.host, _listen(server, settings))
    async with (
        background(service.run(), name="registry_publishing") as publishing,
        AsyncExitStack() as stack,
    ):
        shown = (*metrics, LoopTasks(asyncio.get_running_loop()))
        metrics_url = stack.enter_context(serving_metrics(service, settings.host, settings.metrics_port, shown))
        await server.start()
        try:
            for name in ("", *names):
                await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
            log.info(
                "control_plane_listening",
                address=address,
                metrics=metrics_url,
                lease_s=settings.lease_s,
                registry=service.registry_id,
            )
            yield ControlPlane(address, metrics_url, service, publishing)
        finally:
            await checks.enter_graceful_shutdown()
            planner.close()
            await service.close()
            await server.stop(STOP_GRACE_S)


def _listen(server: grpc.aio.Server, settings: ControlPlaneSettings) -> int:
    wanted = host_port(settings.host, settings.port)
    try:
        return listen(server, wanted, what="the control plane (control_plane.host)")
    except RuntimeError as error:
        raise StartupError(
            f"the control plane cannot listen on {wanted}: port {settings.port} is in use, or {settings.host} is not "
            "an address of this machine. Stop what listens there (another control plane?), or set "
            "control_plane.port and control_plane.address",
        ) from error


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()
