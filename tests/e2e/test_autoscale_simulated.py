"""A whole cluster of simulated workers under a rising load, with two planners: one acts, the other takes over.

Simulated engines take the time that their profile says, and no CPU: what is seen here is the planner's doing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.policy_file import write_policy
from slipstream.client import AsyncClient
from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import Cluster, eventually, scrape, wait_for
from tests.support.rising_load import RisingLoad
from tests.support.text_model_folder import write_model_folder

# A prefill worker takes 0.39 s for such a prompt: 2.5 of them a second.
PROMPT_TOKENS, ANSWER_TOKENS = 256, 8
LOW_PER_S, HIGH_PER_S, FIRST_AT_ONCE = 0.5, 5.0, 16
TTFT_LIMIT_S = 1.5
WAIT_S = 40.0
until = partial(eventually, timeout_s=WAIT_S)
MOST_WORKERS = 4


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    objectives = PlannerObjectives(
        (ModelObjectives("sim", {"realtime": Objective(TTFT_LIMIT_S, 0.25, 90.0)}),),
        gpu_budget=MOST_WORKERS,
        interval_s=0.5,
        start_s=3.0,
        up_cooldown_s=1.0,
        down_cooldown_s=4.0,
        flip_cooldown_s=1.0,
        horizon_s=4.0,
    )
    write_policy(objectives, path)
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Iterator[Cluster]:
    model = write_model_folder(tmp_path_factory.mktemp("model"), config={"max_position_embeddings": 8192})
    folder = tmp_path_factory.mktemp("cluster") / "run"
    flags = ["--engine", "simulated", "--prefill", "1", "--decode", "2", "--served-model-name", "sim"]
    flags += ["--autoscale", "--max-workers", str(MOST_WORKERS), "--planner-policy", str(policy)]
    with Cluster(model, folder, *flags) as running:
        yield running


@contextmanager
def standing_by(cluster: Cluster, policy: Path, log: Path) -> Iterator[Callable[[], bool]]:
    """A second planner; yields whether it is the one that acts."""
    command = [sys.executable, "-m", "slipstream", "planner", "serve", "--policy", str(policy)]
    command += ["--scaler", cluster.scaler, "--follow", cluster.control_plane, "--port", "0"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environ) as process:
        try:
            found = wait_for(
                "the second planner listens",
                lambda: re.search(r"control_plane_listening.* metrics=(http\S+)", log.read_text()),
                timeout_s=WAIT_S,
            )
            yield lambda: scrape(found[1])["slipstream_planner_leader"] == 1.0
        finally:
            process.terminate()


async def test_load_rises_workers_flip_and_start_a_planner_dies_the_other_drains_and_no_request_notices(
    cluster: Cluster, policy: Path, tmp_path: Path
) -> None:
    await until("all are known", lambda: cluster.ready_roles() == {Role.ROLE_PREFILL: 1, Role.ROLE_DECODE: 2})
    with standing_by(cluster, policy, tmp_path / "second.log") as second_leads:
        async with AsyncClient(cluster.grpc_target) as client:
            load = RisingLoad(client, PROMPT_TOKENS, ANSWER_TOKENS, range(10, 200))
            async with load.running():
                load.at_once = FIRST_AT_ONCE
                await load.rise_until(TTFT_LIMIT_S, deadline_s=WAIT_S)
                await until("more workers compute prompts", lambda: cluster.ready_roles()[Role.ROLE_PREFILL] >= 2)
                load.at_once, load.rate_per_s = 0, HIGH_PER_S
                assert not second_leads()
                acting = wait_for("the control plane's process", lambda: control_plane(cluster), timeout_s=5)
                acting.kill()
                await until("the second planner acts", second_leads)
                await until("first tokens come in time", lambda: load.recent_ttft_s() < TTFT_LIMIT_S)
                load.rate_per_s = LOW_PER_S
                await until("workers are let go", lambda: 0 < sum(cluster.ready_roles().values()) < MOST_WORKERS)
            assert load.failed() == []
            assert await load.wrong(sample=10) == []
        assert second_leads()
        first_log, second_log = cluster.log("control-plane"), (tmp_path / "second.log").read_text()
    assert "action_done" in first_log
    assert "flip worker-" in first_log + second_log
    assert "drain worker-" in second_log
    assert len(load.asked) > 20


def control_plane(cluster: Cluster) -> psutil.Process | None:
    """The process of the registry and the first planner."""
    return next((one for one in cluster.processes() if one.cmdline()[4:6] == ["planner", "serve"]), None)


def test_what_the_planner_started_is_ended_with_the_cluster(cluster: Cluster) -> None:
    family = [one for one in cluster.processes() if "-worker" in " ".join(one.cmdline())]
    assert family
    assert cluster.stop() == 0
    time.sleep(0.1)
    assert not any(one.is_running() for one in family)
