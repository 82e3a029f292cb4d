"""What the live planner is made of in a control plane's process: policy, scaler, loop, and where it looks.

Beside a registry it looks at that one's set, and frontends report to it. One that stands by elsewhere
(`planner.follow`) watches the registry as frontends do, and has the reports passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import grpc.aio

from planner.loop import PlannerLoop
from planner.no_scaler import NoScaler
from planner.objectives import PlannerObjectives
from planner.policy import SloPolicy
from planner.policy_file import read_policy
from planner.profile_watch import ProfileWatch
from planner.remote_scaler import RemoteScaler
from slipstream import registry_watch, telemetry
from slipstream.background import background
from slipstream.errors import ConfigError, SlipstreamError
from slipstream.grpc_channels import client_options
from slipstream.grpc_errors import from_rpc_error
from slipstream.performance import Profile, read_profile
from slipstream.placement_settings import PlannerSettings
from slipstream.registry_watch import RegistryView
from slipstream.scaler import Scaler
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.planner_pb2 import TrafficReport, WatchTrafficRequest
from slipstream.v1.planner_pb2_grpc import PlannerStub
from slipstream.v1.registry_pb2 import WorkerRecord, WorkerSet
from slipstream.worker_settings import HealthSettings

log = telemetry.get_logger(__name__)

WATCH_AGAIN_S = 1.0
RECONNECT_BACKOFF_S = 0.5

FindProfile = Callable[[str], Path]
"""Where the profile is that a policy names; packaged ones go by their names."""

Records = Callable[[], Iterable[WorkerRecord]]
"""The workers as the registry has them."""

OpenScaler = Callable[[Records], AbstractAsyncContextManager[Scaler]]
"""Makes the scaler of what runs workers; entered while the planner plans."""


@asynccontextmanager
async def open_planner(
    settings: PlannerSettings,
    posted: Callable[[], WorkerSet],
    find_profile: FindProfile,
    scalers: Mapping[str, OpenScaler] = MappingProxyType({}),
    *,
    health: HealthSettings | None = None,
) -> AsyncIterator[PlannerLoop]:
    """A planner by the settings' policy file, which plans while the body runs.

    Args:
        posted: the set of the registry beside it.
        scalers: by what `planner.scaler` may name instead of an address.
        health: limits of the replacing of sick workers.

    Raises:
        ConfigError: the policy or a profile cannot be read, or nobody is there to act.
    """
    assert settings.policy is not None, "the caller has looked"
    objectives = read_policy(settings.policy)
    if not settings.scaler and not settings.dry_run:
        raise ConfigError(
            "planner.scaler: none is set, so that nothing could be done; start the cluster with `slipstream up "
            "--autoscale`, set planner.scaler to kubernetes inside of one, or set planner.dry_run",
            param="planner.scaler",
        )

    def make_policy(wanted: PlannerObjectives) -> SloPolicy:
        return SloPolicy(wanted, profiles_of(wanted, find_profile), tells_considered=True)

    async with AsyncExitStack() as stack:
        if settings.follow is not None:
            followed = FollowedCluster(settings.follow)
            posted = followed.posted
        scaler: Scaler = NoScaler()
        if settings.scaler:
            opened = _scaler_of(settings.scaler, scalers)
            scaler = await stack.enter_async_context(opened(lambda: posted().workers))
        loop = PlannerLoop(objectives, make_policy, scaler, posted, dry_run=settings.dry_run, health=health)
        if settings.follow is not None:
            for work in (followed.follow_registry(), followed.follow_traffic(loop.take_report)):
                await stack.enter_async_context(background(work, name="planner-follows"))
        await stack.enter_async_context(background(ProfileWatch(loop, posted).follow(), name="planner-profiles"))
        await stack.enter_async_context(background(loop.follow(), name="planner"))
        log.info(
            "planner_started",
            policy=str(settings.policy),
            dry_run=settings.dry_run,
            holder=loop.holder,
            scaler=settings.scaler,
        )
        yield loop


def _scaler_of(name: str, scalers: Mapping[str, OpenScaler]) -> OpenScaler:
    if name in scalers:
        return scalers[name]
    if ":" not in name:
        known = ", ".join(scalers) or "none here"
        raise ConfigError(
            f"planner.scaler: {name!r} is no address (host:port, unix:PATH), and no scaler has that name ({known})",
            param="planner.scaler",
        )
    return partial(RemoteScaler, name)


def profiles_of(objectives: PlannerObjectives, find_profile: FindProfile) -> Mapping[str, Profile]:
    """By model, the profiles that the policy names.

    Raises:
        ConfigError: one cannot be read.
    """
    return {one.model: read_profile(find_profile(one.profile)) for one in objectives.models if one.profile}


class FollowedCluster:
    """The workers and the traffic of a control plane in another process, through all its outages."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._view = RegistryView()
        self._told = False

    def posted(self) -> WorkerSet:
        """What is known of the workers; the last view stays while the registry is gone."""
        return WorkerSet(workers=self._view.records(), settled=self._view.known and self._view.settled)

    async def follow_registry(self) -> NoReturn:
        await registry_watch.follow(self._address, take=self._take, lost=self._note_lost)

    async def follow_traffic(self, take: Callable[[TrafficReport], float]) -> NoReturn:
        """Have each report taken."""
        options = client_options(max_reconnect_backoff_s=RECONNECT_BACKOFF_S)
        async with open_channel(self._address, peer=ComponentRole.CONTROL_PLANE, options=options) as channel:
            while True:
                try:
                    async for report in PlannerStub(channel).WatchTraffic(WatchTrafficRequest()):
                        take(report)
                except grpc.aio.AioRpcError as error:
                    self._note_lost(from_rpc_error(error).message)
                except SlipstreamError as error:
                    self._note_lost(error.message)
                await asyncio.sleep(WATCH_AGAIN_S)

    async def _take(self, workers: WorkerSet) -> None:
        self._view.apply(workers)
        self._told = False

    def _note_lost(self, reason: str) -> None:
        if not self._told:
            log.warning("control_plane_lost", control_plane=self._address, reason=reason)
        self._told = True
