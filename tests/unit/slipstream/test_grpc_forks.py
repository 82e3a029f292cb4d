"""Programs are started while gRPC's calls are under way. In a process of its own, since forks touch all its threads."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

PROGRAM = """
import asyncio
import slipstream
import uvloop
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def ask(address, over):
    async with grpc.aio.insecure_channel(address) as channel:
        while not over.is_set():
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

async def main():
    server, over = grpc.aio.server(), asyncio.Event()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with asyncio.TaskGroup() as asking:
        for _ in range(3):
            asking.create_task(ask(address, over))
        ended = []
        for _ in range(200):
            ended.append(await (await asyncio.create_subprocess_exec("true")).wait())
        over.set()
    await server.stop(0)
    print(len(ended), sum(ended))

uvloop.run(main())
"""


def test_programs_are_started_while_calls_are_under_way() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("200 0\n", "")


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "slipstream"])
def test_whichever_package_is_imported_first_grpc_finds_how_it_is_to_fork(package: str) -> None:
    program = f"import sys, os, {package}; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'], 'grpc' in sys.modules)"
    unset = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    run = subprocess.run([sys.executable, "-c", program], env=unset, capture_output=True, text=True, timeout=60)
    assert run.stdout == "0 False\n", run.stderr
