"""The planner flips, drains and starts real vLLM workers under a real load, and no request notices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from planner.objectives import Bounds, ModelObjectives, Objective, PlannerObjectives
from planner.policy_file import dump_policy, write_policy
from slipstream.client import AsyncClient
from slipstream.performance import DecodePoint, PrefillPoint, Profile, encode_profile
from slipstream.v1.planner_pb2 import ApplyRequest
from slipstream.v1.planner_pb2_grpc import PlannerStub
from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import START_TIMEOUT_S, Cluster, eventually
from tests.support.rising_load import RisingLoad
from tests.support.tiny_model import SPECIAL_TOKENS, VOCAB_SIZE

PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE
# In steps of 64 tokens, each of which costs vLLM some milliseconds of CPU time, whatever the model's size.
PROMPT_TOKENS, STEP_TOKENS, ANSWER_TOKENS = 3000, 64, 8
PROMPT_S = 0.52
LOW_PER_S, FIRST_AT_ONCE = 0.3, 16
TTFT_LIMIT_S = 4.0
"""Far above what one prompt takes, also where other programs compute."""
WAIT_S = START_TIMEOUT_S
until = partial(eventually, timeout_s=WAIT_S)


def tiny_profile() -> Profile:
    """As `slipstream profile --quick --cpu-clock` measured it on one core of an AMD EPYC."""
    return Profile(
        name="tiny",
        model="tiny",
        device="cpu",
        source="slipstream profile --quick --cpu-clock --threads 1, in steps of 64 tokens",
        measured_on="2026-11-21",
        prefill=(PrefillPoint(64, 0.0112), PrefillPoint(3000, PROMPT_S)),
        decode=tuple(DecodePoint(batch, context, 0.0085) for batch in (1, 64) for context in (128, 3072)),
        block_tokens=128,
        block_bytes=65536,
        blocks=255,
        step_tokens=STEP_TOKENS,
        max_running=64,
        max_model_len=8192,
        transfer_bytes_per_s=4e9,
        transfer_latency_s=8e-5,
        prefill_step_tokens=3000,
    )


def policy_for(profile: Path, *, min_decode: int) -> PlannerObjectives:
    objective = Objective(TTFT_LIMIT_S, 0.5, 90.0)
    bounds = Bounds(min_decode=min_decode)
    return PlannerObjectives(
        (ModelObjectives("tiny", {"realtime": objective}, profile=str(profile), bounds=bounds),),
        gpu_budget=3,
        interval_s=0.5,
        start_s=4.0,
        up_cooldown_s=1.0,
        down_cooldown_s=4.0,
        flip_cooldown_s=1.0,
        horizon_s=4.0,
    )


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    path.write_bytes(encode_profile(tiny_profile()))
    return path


@pytest.fixture(scope="module")
def policy(profile: Path) -> Path:
    path = profile.with_name("policy.yaml")
    write_policy(policy_for(profile, min_decode=2), path)
    return path


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("autoscaled")
    flags = ["--dtype", "float32", "--served-model-name", "tiny", "--max-batched-tokens", str(STEP_TOKENS)]
    flags += ["--prefill", "1", "--decode", "1", "--autoscale", "--max-workers", "3"]
    flags += ["--planner-policy", str(policy), "--control-plane-lease-s", "2"]
    with Cluster(tiny_model, folder / "run", *flags, warm=True) as running:
        yield running


def apply(cluster: Cluster, objectives: PlannerObjectives) -> None:
    """Put a policy in force."""
    with grpc.insecure_channel(cluster.control_plane) as channel:
        request = ApplyRequest(policy_yaml=dump_policy(objectives), name="test")
        assert PlannerStub(channel).Apply(request, timeout=10).applied


def prompts_at(cluster: Cluster) -> int:
    """Prefill workers that have prompts."""
    return sum(one.role == PREFILL and one.load.running > 0 for one in cluster.workers())


async def test_real_workers_are_started_flipped_and_drained_as_the_load_rises_and_falls(
    cluster: Cluster, profile: Path, policy: Path
) -> None:
    await until("the policy's floor is there", lambda: cluster.ready_roles() == {PREFILL: 1, DECODE: 2})
    fewer = policy_for(profile, min_decode=1)
    async with AsyncClient(cluster.grpc_target, timeout_s=120) as client:
        load = RisingLoad(client, PROMPT_TOKENS, ANSWER_TOKENS, range(len(SPECIAL_TOKENS), VOCAB_SIZE))
        async with load.running():
            load.at_once = FIRST_AT_ONCE
            await load.rise_until(TTFT_LIMIT_S, deadline_s=WAIT_S)
            apply(cluster, fewer)
            await until("a decode worker computes prompts", lambda: cluster.ready_roles() == {PREFILL: 2, DECODE: 1})
            await until("both compute prompts", lambda: prompts_at(cluster) == 2)
            write_policy(fewer, policy)
            planner = next(one for one in cluster.processes() if one.cmdline()[4:6] == ["planner", "serve"])
            planner.kill()
            await until("first tokens come sooner", lambda: load.recent_ttft_s() < 0.9 * load.worst_ttft_s)
            load.at_once, load.rate_per_s = 0, LOW_PER_S
            await until("a worker is let go", lambda: cluster.ready_roles() == {PREFILL: 1, DECODE: 1})
        assert load.failed() == []
        assert await load.wrong(sample=8) == []
    assert len(load.asked) > 20
    log = cluster.log("control-plane")
    for action in ("start decode tiny", "flip worker-", "drain worker-"):
        assert f"action='{action}" in log
