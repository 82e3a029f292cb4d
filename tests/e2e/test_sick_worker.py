"""A worker becomes sick under load: it is fenced, replaced and ended, no request notices, and the budget holds.

Simulated engines take the time that their profile says, and no CPU. Sickness comes the way that people bring it:
through `health.file`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives
from planner.policy_file import write_policy
from slipstream.client import AsyncClient
from slipstream.v1.registry_pb2 import HealthState, Role, WorkerRecord, WorkerState
from tests.support.cluster import Cluster, eventually, scrape
from tests.support.rising_load import RisingLoad
from tests.support.text_model_folder import write_model_folder

PROMPT_TOKENS, ANSWER_TOKENS = 48, 150
AT_ONCE = 6
DRAIN_S = 0.5
REPLACEMENT_S = 1.0
"""Both together are shorter than an answer takes: what is cut off has to go on elsewhere."""
WAIT_S = 40.0
until = partial(eventually, timeout_s=WAIT_S, every_s=0.1)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("told") / "sick"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, told: Path) -> Iterator[Cluster]:
    """One prefill and three decode workers, room for one more, and a planner that is content with them."""
    model = write_model_folder(tmp_path_factory.mktemp("model"), config={"max_position_embeddings": 8192})
    folder = tmp_path_factory.mktemp("cluster")
    policy = folder / "policy.yaml"
    bounds = Bounds(min_prefill=1, min_decode=3, max_prefill=1, max_decode=3)
    objectives = ModelObjectives("sim", {"realtime": Objective(5.0, 1.0, 90.0)}, bounds=bounds)
    write_policy(PlannerObjectives((objectives,), gpu_budget=5, interval_s=0.5, start_s=3.0), policy)
    flags = ["--engine", "simulated", "--prefill", "1", "--decode", "3", "--served-model-name", "sim"]
    flags += ["--autoscale", "--max-workers", "5", "--planner-policy", str(policy)]
    flags += ["--health-file", str(told), "--health-interval-s", "0.2", "--health-drain-timeout-s", str(DRAIN_S)]
    flags += ["--health-replacement-timeout-s", str(REPLACEMENT_S), "--health-replacements-per-hour", "1"]
    with Cluster(model, folder / "run", *flags) as running:
        yield running


def say(file: Path, line: str) -> None:
    """As a person would, with an editor."""
    file.write_text(f"# told by the test\n{line}\n")


def decode_workers(cluster: Cluster) -> dict[str, WorkerRecord]:
    return {one.worker_id: one for one in cluster.workers(settled=True) if one.role == Role.ROLE_DECODE}


def ready_decode(cluster: Cluster) -> set[str]:
    return {name for name, one in decode_workers(cluster).items() if one.state == WorkerState.READY}


async def test_a_sick_worker_is_fenced_replaced_and_ended_and_no_request_notices(cluster: Cluster, told: Path) -> None:
    await until("all are ready", lambda: len(ready_decode(cluster)) == 3)
    sick = min(ready_decode(cluster))
    async with AsyncClient(cluster.grpc_target) as client:
        load = RisingLoad(client, PROMPT_TOKENS, ANSWER_TOKENS, range(10, 200))
        async with load.running():
            load.at_once = AT_ONCE
            await until("it works", lambda: decode_workers(cluster)[sick].load.running > 0)
            say(told, f"{sick} sick its fan makes a strange noise")
            await until("it is fenced", lambda: decode_workers(cluster)[sick].state == WorkerState.FENCED)
            record = decode_workers(cluster)[sick]
            assert record.health.state == HealthState.SICK
            assert record.health.fenced_because == "its fan makes a strange noise"
            await until("another is in its place", lambda: len(ready_decode(cluster)) == 3)
            assert sick not in ready_decode(cluster)
            await until("it has ended", lambda: sick not in decode_workers(cluster))
            # The budget is spent: the next one is told of, and stays.
            other = min(ready_decode(cluster))
            say(told, f"{other} sick it looks sick too")
            await until(
                "it is held in service",
                lambda: scrape(cluster.control_plane_metrics)["slipstream_health_sick_in_service:budget"] == 1.0,
            )
            await asyncio.sleep(1.0)
            assert other in ready_decode(cluster)
        assert load.failed() == []
        assert await load.wrong(sample=2) == []
    assert len(load.asked) >= AT_ONCE
    assert len(ready_decode(cluster)) == 3
    figures = scrape(cluster.control_plane_metrics)
    assert figures["slipstream_health_replacements_total:done"] == 1.0
    assert figures["slipstream_health_orders_total:fence:done"] == 1.0
    assert figures["slipstream_health_budget_left"] == 0.0
    assert f"{sick}: sick: its fan makes a strange noise" in cluster.output()


async def test_what_was_cut_off_went_on_elsewhere(cluster: Cluster) -> None:
    """Requests outlived their worker: else the test above would have shown nothing."""
    figures = scrape(f"{cluster.http_url}/metrics")
    moved = [value for name, value in figures.items() if name.startswith("slipstream_migrations_total")]
    assert sum(moved) > 0
