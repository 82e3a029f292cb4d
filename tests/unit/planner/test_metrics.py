"""The control plane's page for Prometheus: how many workers there are, and where theirs are."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from typing import Any

import pytest

from planner.server import ControlPlane, open_control_plane
from slipstream.errors import StartupError
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.registry_pb2 import Role, WorkerState
from tests.support.cluster import scrape
from tests.support.scripted_worker import ScriptedWorker, until


async def page(plane: ControlPlane) -> dict[str, float]:
    return await asyncio.to_thread(scrape, plane.metrics_url)


def _targets(url: str) -> Any:
    with urllib.request.urlopen(url.removesuffix("metrics") + "targets", timeout=5) as response:
        assert response.headers["content-type"] == "application/json"
        return json.load(response)


async def test_workers_are_counted_by_role_and_state_and_found_by_prometheus() -> None:
    async with open_control_plane(ControlPlaneSettings(port=0, lease_s=2)) as plane:
        assert "slipstream_registry_workers" not in await page(plane)
        decode = ScriptedWorker(plane.address, Role.ROLE_DECODE, "d0", state=WorkerState.DRAINING)
        decode.record.metrics_url = "http://10.0.0.7:9123/metrics"
        async with decode, ScriptedWorker(plane.address, Role.ROLE_PREFILL, "p0"):
            await until(lambda: len(plane.service.posted.workers) == 2)
            seen = await page(plane)
            targets = await asyncio.to_thread(_targets, plane.metrics_url)

    # Labels in the order of their names: model, state; `role` is left out by `scrape`.
    assert seen["slipstream_registry_workers:scripted:draining"] == 1
    assert seen["slipstream_registry_workers:scripted:ready"] == 1
    assert seen["slipstream_registry_registrations_total"] >= 2
    assert seen["slipstream_registry_watchers"] == 0
    assert targets == [
        {
            "targets": ["10.0.0.7:9123"],
            "labels": {
                "__scheme__": "http",
                "__metrics_path__": "/metrics",
                "__meta_slipstream_worker": "d0",
                "__meta_slipstream_role": "decode",
                "__meta_slipstream_state": "draining",
                "__meta_slipstream_model": "scripted",
            },
        }
    ]


async def test_a_taken_port_is_named_with_its_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ControlPlaneSettings(port=0, metrics_port=taken.getsockname()[1])
        with pytest.raises(StartupError, match=r"control_plane\.metrics_port: cannot listen"):
            async with open_control_plane(settings):
                pytest.fail("it listens")
