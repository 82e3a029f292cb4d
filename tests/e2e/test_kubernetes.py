"""A whole cluster as on Kubernetes: the planner scales Deployments, and their pods are real worker processes.

The API server is the one of the tests (`tests.support.kubernetes_server`), over HTTP; planner, frontend and workers are
the product's own processes with the environment that the chart gives them. Simulated engines take the time that their
profile says, and no CPU.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.policy_file import write_policy
from slipstream import registry_watch
from slipstream.background import background
from slipstream.client import AsyncClient
from slipstream.free_ports import free_port
from slipstream.v1.registry_pb2 import Role, WorkerSet, WorkerState
from tests.support.cluster import status_of, wait_for
from tests.support.kubernetes_server import KubernetesServer
from tests.support.process_kubelet import ProcessKubelet
from tests.support.rising_load import RisingLoad
from tests.support.scripted_worker import until
from tests.support.text_model_folder import write_model_folder

# A prefill worker takes 0.39 s for such a prompt: 2.5 of them a second.
PROMPT_TOKENS, ANSWER_TOKENS = 256, 8
LOW_PER_S, FIRST_AT_ONCE = 0.5, 16
TTFT_LIMIT_S = 1.5
WAIT_S = 40.0
MOST_WORKERS = 4
POLICY = PlannerObjectives(
    (ModelObjectives("sim", {"realtime": Objective(TTFT_LIMIT_S, 0.25, 90.0)}),),
    gpu_budget=MOST_WORKERS,
    interval_s=0.5,
    start_s=3.0,
    up_cooldown_s=1.0,
    down_cooldown_s=4.0,
    flip_cooldown_s=1.0,
    horizon_s=4.0,
)


@dataclass(slots=True)
class Served:
    """What runs, and what the registry says of it."""

    server: KubernetesServer
    kubelet: ProcessKubelet
    folder: Path
    grpc_target: str
    workers: WorkerSet

    def ready(self) -> Counter[Role.ValueType]:
        return Counter(one.role for one in self.workers.workers if one.state == WorkerState.READY)

    def seats(self) -> int:
        return sum(int(one["spec"]["replicas"]) for one in self.server.store.all("deployments"))

    def actions(self, kind: str) -> list[str]:
        """Those of the planner that were done."""
        log = (self.folder / "planner.log").read_text()
        return re.findall(rf"action_done .*action='?({kind} [^'\n]*)", log)


@asynccontextmanager
async def process(log: Path, *arguments: str, environ: dict[str, str]) -> AsyncIterator[None]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    command = (sys.executable, "-P", "-m", "slipstream", *arguments)
    with log.open("wb") as output:
        running = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, env={**inherited, **environ}
        )
    try:
        yield
    finally:
        running.terminate()
        async with asyncio.timeout(30):
            await running.wait()


@asynccontextmanager
async def served(folder: Path, *, prefill: int, decode: int) -> AsyncIterator[Served]:
    model = write_model_folder(folder, config={"max_position_embeddings": 8192})
    policy, plane = folder / "policy.yaml", f"127.0.0.1:{free_port()}"
    http_port, grpc_port = free_port(), free_port()
    write_policy(POLICY, policy)
    known = {"SLIPSTREAM_CONTROL_PLANE__ADDRESS": plane, "SLIPSTREAM_MODEL": str(model)}
    known["SLIPSTREAM_SERVED_MODEL_NAME"] = "sim"
    planner = {
        "SLIPSTREAM_CONTROL_PLANE__PORT": plane.rpartition(":")[2],
        "SLIPSTREAM_PLANNER__POLICY": str(policy),
        "SLIPSTREAM_PLANNER__SCALER": "kubernetes",
    }
    faces = {"SLIPSTREAM_FRONTEND__HTTP_PORT": str(http_port), "SLIPSTREAM_FRONTEND__GRPC_PORT": str(grpc_port)}
    async with KubernetesServer(acts_after_s=0.05) as server:
        planner["SLIPSTREAM_KUBERNETES__KUBECONFIG"] = str(server.write_kubeconfig(folder / "kubeconfig"))
        kubelet = ProcessKubelet(server.controllers, folder, ("--engine", "simulated"), known)
        found = Served(server, kubelet, folder, f"127.0.0.1:{grpc_port}", WorkerSet())

        async def take(workers: WorkerSet) -> None:
            found.workers = workers

        following = registry_watch.follow(plane, take=take, lost=lambda reason: None)
        async with (
            process(folder / "planner.log", "planner", "serve", environ=planner),
            process(folder / "frontend.log", "frontend", environ={**known, **faces}),
            kubelet.running(),
            background(following, name="registry"),
        ):
            server.add_deployment("prefill", prefill, model="sim")
            server.add_deployment("decode", decode, model="sim")
            url = f"http://127.0.0.1:{http_port}/health/ready"
            await asyncio.to_thread(wait_for, "requests are taken", lambda: status_of(url) == 200, timeout_s=WAIT_S)
            yield found


async def test_load_rises_pods_flip_and_come_load_falls_pods_go_and_no_request_notices(tmp_path: Path) -> None:
    async with served(tmp_path, prefill=1, decode=2) as at, AsyncClient(at.grpc_target) as client:
        await reached("all are known", lambda: at.ready() == {Role.ROLE_PREFILL: 1, Role.ROLE_DECODE: 2})
        first = set(at.kubelet.containers)
        load = RisingLoad(client, PROMPT_TOKENS, ANSWER_TOKENS, range(10, 200))
        async with load.running():
            load.at_once = FIRST_AT_ONCE
            await load.rise_until(TTFT_LIMIT_S, deadline_s=WAIT_S)
            await reached("a pod more serves", lambda: at.ready().total() == MOST_WORKERS)
            await reached("more workers compute prompts", lambda: at.ready()[Role.ROLE_PREFILL] >= 2)
            assert at.seats() == MOST_WORKERS
            load.at_once, load.rate_per_s = 0, LOW_PER_S
            await reached("pods are let go", lambda: at.kubelet.codes)
        assert load.failed() == []
        assert len(load.asked) > 20
        assert at.actions("start")
        drained = [one.removeprefix("drain ") for one in at.actions("drain")]
        assert set(at.kubelet.codes) <= set(drained), "those went that were meant, and nobody else"
        assert set(at.kubelet.codes.values()) == {0}, "each finished what it had and ended by itself"
        assert at.kubelet.killed == []
        assert at.seats() == MOST_WORKERS - len(drained)
        started = set(at.kubelet.containers) | set(at.kubelet.codes)
        assert len(started - first) == len(at.actions("start")), "no pod came that nobody had asked for"
        lease = at.server.store.get("leases", "slipstream-planner")["spec"]
        assert (lease["leaseTransitions"], bool(lease["holderIdentity"])) == (0, True)
    assert not at.server.store.get("leases", "slipstream-planner")["spec"]["holderIdentity"], "let go at the end"


async def reached(what: str, probe: Callable[[], object]) -> None:
    try:
        await until(probe, limit_s=WAIT_S)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {WAIT_S:g} s") from None
