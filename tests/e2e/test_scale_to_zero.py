"""A cluster without a worker: the first request waits for the one that the planner starts, or is told when to come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives
from planner.policy_file import write_policy
from slipstream.client import AsyncClient
from slipstream.errors import UnavailableError
from tests.support.cluster import Cluster, eventually
from tests.support.text_model_folder import write_model_folder

WAIT_S = 40.0
until = partial(eventually, timeout_s=WAIT_S)
START_S = 4.0
PROMPT = list(range(10, 74))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    objectives = PlannerObjectives(
        (ModelObjectives("sim", {"realtime": Objective(5.0, 0.5)}, bounds=Bounds(to_zero=True, idle_s=2.0)),),
        gpu_budget=2,
        interval_s=0.5,
        start_s=START_S,
        up_cooldown_s=0.5,
        down_cooldown_s=2.0,
        flip_cooldown_s=0.5,
        horizon_s=5.0,
    )
    write_policy(objectives, tmp_path / "policy.yaml")
    (tmp_path / "model").mkdir()
    model = write_model_folder(tmp_path / "model", config={"max_position_embeddings": 8192})
    flags = ["--engine", "simulated", "--prefill", "1", "--decode", "1", "--served-model-name", "sim"]
    flags += ["--autoscale", "--max-workers", "2", "--planner-policy", str(tmp_path / "policy.yaml")]
    with Cluster(model, tmp_path / "run", *flags) as running:
        yield running


async def test_the_first_request_after_a_quiet_time_waits_for_a_worker_that_is_started_for_it(
    cluster: Cluster,
) -> None:
    async with AsyncClient(cluster.grpc_target) as client:
        await until("two workers are there", lambda: sum(cluster.ready_roles().values()) == 2)
        await until("nobody is left", lambda: sum(cluster.ready_roles().values()) == 0)
        # A start takes longer than that: refused at once, and told when to come back.
        began_s = time.monotonic()
        with pytest.raises(UnavailableError) as refused:
            await client.complete(PROMPT, max_tokens=4, timeout_s=1.0)
        assert time.monotonic() - began_s < 1.0
        assert refused.value.retry_after_s is not None
        assert 1.0 <= refused.value.retry_after_s <= 3 * START_S
        answers = await asyncio.gather(*(client.complete(PROMPT, max_tokens=4, timeout_s=WAIT_S) for _ in range(3)))
        assert [len(one.token_ids) for one in answers] == [4, 4, 4]
        assert cluster.ready_roles()
    assert "start decode sim" in cluster.log("control-plane")
