"""A namespace with two pools, and the scaler of a planner that looks at it over HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.kubernetes.connection import connected
from deploy.kubernetes.scaler import KubernetesScaler
from slipstream.placement_settings import KubernetesSettings
from tests.support.kubernetes_objects import Object
from tests.support.kubernetes_server import KubernetesServer


@dataclass(slots=True)
class Time:
    """Both clocks of a planner, as far ahead as a test wants them."""

    ahead_s: float = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def unix(self) -> float:
        return time.time() + self.ahead_s


@dataclass(slots=True)
class World:
    """What is there, and one planner that acts on it."""

    server: KubernetesServer
    scaler: KubernetesScaler
    time: Time

    def seats(self, pool: str) -> int:
        replicas: int = self.server.store.get("deployments", f"slipstream-{pool}")["spec"]["replicas"]
        return replicas

    def names(self, pool: str) -> list[str]:
        """Of the pool's pods that are not ending."""
        return sorted(one["metadata"]["name"] for one in self.server.pods(pool))

    def pod(self, name: str) -> Object:
        return self.server.store.get("pods", name)

    def all_ready(self) -> None:
        for one in self.server.pods():
            self.server.controllers.set_ready(one)


@asynccontextmanager
async def world(folder: Path, *, holder: str = "one", **more: object) -> AsyncIterator[World]:
    async with KubernetesServer() as server, planner(server, folder, holder=holder, **more) as found:
        yield found


@asynccontextmanager
async def planner(
    server: KubernetesServer, folder: Path, *, holder: str = "one", **more: object
) -> AsyncIterator[World]:
    """A planner's view of it; it holds the lease where it has a name."""
    kubeconfig = server.write_kubeconfig(folder / "kubeconfig")
    settings = KubernetesSettings.model_validate({"kubeconfig": kubeconfig, "timeout_s": 5.0, **more})
    async with connected(settings) as api:
        time_of = Time()
        scaler = KubernetesScaler(api, settings, lambda: (), clock=time_of.monotonic, unix_clock=time_of.unix)
        if holder:
            assert await scaler.hold_lease(holder, 60.0)
        yield World(server, scaler, time_of)
