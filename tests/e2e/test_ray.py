"""A cluster on a real Ray cluster of several nodes: scaled by its planner, and kept whole while what it needs dies.

All nodes are on this machine; workers are simulated. Every test runs under load, and no request may fail: streams of a
worker that died are taken over by others.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives
from planner.policy_file import dump_policy, write_policy
from slipstream.client import AsyncClient
from slipstream.security.names import ComponentRole
from slipstream.v1.planner_pb2 import ApplyRequest
from slipstream.v1.planner_pb2_grpc import PlannerStub
from slipstream.v1.registry_pb2 import ROLE_DECODE, ROLE_PREFILL
from tests.support.cluster import eventually
from tests.support.ray_cluster import ClusterOnRay, RayCluster
from tests.support.rising_load import RisingLoad
from tests.support.text_model_folder import write_model_folder

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (slipstream[ray])")

NAME = "test"
PROMPT_TOKENS, ANSWER_TOKENS, RATE_PER_S = 64, 24, 3.0
WAIT_S = 60.0
until = partial(eventually, timeout_s=WAIT_S)


def objectives(prefill: int, decode: int) -> PlannerObjectives:
    """Exactly so many workers."""
    bounds = Bounds(min_prefill=prefill, max_prefill=prefill, min_decode=decode, max_decode=decode)
    model = ModelObjectives("sim", {"realtime": Objective(5.0, 1.0, 90.0)}, bounds=bounds)
    return PlannerObjectives(
        (model,),
        gpu_budget=8,
        interval_s=0.5,
        start_s=3.0,
        up_cooldown_s=0.5,
        down_cooldown_s=0.5,
        flip_cooldown_s=0.5,
        horizon_s=4.0,
    )


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    with RayCluster(2, cpus=6) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), config={"max_position_embeddings": 8192})


@pytest.fixture(scope="module")
def cluster(ray: RayCluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOnRay]:
    folder = tmp_path_factory.mktemp("cluster")
    policy = folder / "policy.yaml"
    write_policy(objectives(2, 2), policy)
    flags = ["--engine", "simulated", "--prefill", "2", "--decode", "2", "--served-model-name", "sim", "--name", NAME]
    flags += ["--autoscale", "--max-workers", "6", "--planner-policy", str(policy), "--control-plane-lease-s", "3"]
    flags += ["--orphan-after-s", "30"]
    with ClusterOnRay(ray, model, folder / "run", *flags) as running:
        yield running


@asynccontextmanager
async def under_load(cluster: ClusterOnRay) -> AsyncIterator[RisingLoad]:
    """Every request that is sent while the block runs is answered, and rightly."""
    async with AsyncClient(cluster.grpc_target) as client:
        load = RisingLoad(client, PROMPT_TOKENS, ANSWER_TOKENS, range(10, 200), rate_per_s=RATE_PER_S)
        async with load.running():
            yield load
        assert load.failed() == []
        assert len(load.asked) > RATE_PER_S
        assert await load.wrong(sample=3) == []


def names(cluster: ClusterOnRay) -> set[str]:
    return {record.worker_id for record in cluster.workers()}


def is_whole(cluster: ClusterOnRay, prefill: int = 2, decode: int = 2) -> bool:
    return cluster.ready_roles() == {ROLE_PREFILL: prefill, ROLE_DECODE: decode}


def apply(cluster: ClusterOnRay, policy: PlannerObjectives) -> None:
    with cluster.channel(cluster.control_plane, ComponentRole.CONTROL_PLANE) as channel:
        PlannerStub(channel).Apply(ApplyRequest(policy_yaml=dump_policy(policy)), timeout=10)


async def test_each_node_has_workers_of_both_roles(cluster: ClusterOnRay, ray: RayCluster) -> None:
    for role in (ROLE_PREFILL, ROLE_DECODE):
        assert cluster.nodes_of(role) == dict.fromkeys(ray.node_ids, 1)


async def test_the_planner_starts_and_drains_workers_and_no_request_notices(
    cluster: ClusterOnRay, model: Path, tmp_path: Path
) -> None:
    """Nor does anybody notice a second cluster that is started by the same name, which refuses to."""
    command = [
        sys.executable,
        "-m",
        "slipstream",
        "up",
        "--on",
        "ray",
        "--name",
        NAME,
        "--address",
        cluster.ray.address,
    ]
    command += ["--engine", "simulated", "--model", str(model), "--log-dir", str(tmp_path / "run")]
    command += ["--http-port", "0", "--grpc-port", "0", "--control-plane-port", "0"]
    second = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    async with under_load(cluster):
        apply(cluster, objectives(2, 3))
        await until("a third decode worker", lambda: is_whole(cluster, decode=3))
        apply(cluster, objectives(2, 2))
        await until("two again", lambda: is_whole(cluster) and len(names(cluster)) == 4)
    _, said = await asyncio.wait_for(second.communicate(), WAIT_S)
    assert second.returncode != 0
    assert "belongs to another `slipstream up --on ray` that runs" in said.decode()
    assert len(names(cluster)) == 4


async def test_a_killed_worker_is_replaced_under_another_name(cluster: ClusterOnRay) -> None:
    async with under_load(cluster):
        victim = cluster.worker(ROLE_DECODE)
        psutil.Process(victim.pid).kill()
        await until("it is replaced", lambda: victim.worker_id not in names(cluster) and is_whole(cluster))


async def test_planner_and_pool_die_and_the_workers_go_on_and_are_found_again(cluster: ClusterOnRay) -> None:
    before = names(cluster)
    async with under_load(cluster):
        for word in ("planner", "deploy.ray.process"):
            (process,) = cluster.children(word)
            process.kill()
        await until("all workers are known again", lambda: is_whole(cluster) and names(cluster) == before)
        await until("the pool has them", lambda: cluster.log("ray-pool").count("worker_found_again") >= len(before))
        apply(cluster, objectives(2, 3))
        await until("the planner acts again", lambda: is_whole(cluster, decode=3))
        apply(cluster, objectives(2, 2))
        await until("in both directions", lambda: is_whole(cluster))
    assert before & names(cluster)


async def test_a_node_that_will_go_is_replaced_before_its_workers_drain(cluster: ClusterOnRay, ray: RayCluster) -> None:
    await asyncio.to_thread(ray.add_node)
    going = ray.node_ids[0]
    await until("all is as before", lambda: is_whole(cluster))
    least = 4

    def left() -> bool:
        nonlocal least
        now = cluster.nodes_of()
        least = min(least, now.total())
        return now[going] == 0 and now.total() == 4

    async with under_load(cluster):
        ray.drain_node(going, deadline_s=120)
        await until("its workers are elsewhere", left)
    assert least == 4, "a worker left before its replacement was there"


async def test_a_node_dies_and_its_workers_are_replaced_elsewhere(cluster: ClusterOnRay, ray: RayCluster) -> None:
    dying = next(iter(cluster.nodes_of(ROLE_DECODE)))
    async with under_load(cluster):
        await asyncio.to_thread(ray.kill_node, dying)
        await until("others have their place", lambda: is_whole(cluster) and dying not in cluster.nodes_of())


def test_what_nobody_asks_for_any_more_ends_by_itself_and_what_has_no_room_says_what_was_asked(
    ray: RayCluster, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.support.ray_driver", ray.address, str(model), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "no node of the Ray cluster had room for 1 CPU + 8 GPU within 0.5 s" in told["no_room"]
    assert "0 of 0 GPU free" in told["no_room"]
    assert told["began"] == {"actors": ["worker-0"], "groups": ["worker-0"]}
    assert (told["left"], told["worker_runs"]) == ([], False)


def test_a_stopped_cluster_leaves_nothing_on_ray_and_a_killed_one_is_ended_by_name(
    cluster: ClusterOnRay, ray: RayCluster
) -> None:
    workers = [psutil.Process(record.pid) for record in cluster.workers()]
    assert cluster.process is not None
    cluster.process.send_signal(signal.SIGKILL)
    cluster.process.wait()
    assert all(worker.is_running() for worker in workers)
    command = [sys.executable, "-m", "slipstream", "down", "--on", "ray", "--name", NAME, "--address", ray.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "Ended worker-" in done.stdout
    gone, alive = psutil.wait_procs(workers, timeout=WAIT_S)
    assert not alive
    assert len(gone) == len(workers)
    again = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert "No worker of test runs on Ray" in again.stdout
