"""A policy under a load, as the command line and the planner's service ask for it."""

from __future__ import annotations

import pytest

from simulator.load_choice import LoadChoice
from simulator.outcome import to_json
from simulator.what_if import SimulateAsk, answer_simulate
from slipstream.errors import ConfigError

POLICY = """
gpu_budget: 6
start_s: 5
models:
  - model: big
    profile: qwen3-32b-h200-tp1
    objectives: {realtime: {ttft_s: 2, itl_s: 0.03}}
  - model: small
    objectives: {realtime: {ttft_s: 2, itl_s: 0.5}}
"""
LOAD = LoadChoice(rate_per_s=8.0, input_tokens=3000.0, output_tokens=150.0, duration_s=60.0)


def ask(**more: object) -> SimulateAsk:
    return SimulateAsk(policy_yaml=POLICY, load=LOAD, profiles={"small": "smollm2-cpu"}, **more)  # type: ignore[arg-type]


def test_the_policy_starts_workers_within_its_budget_and_requests_come_to_the_first_model() -> None:
    said: list[tuple[int, float]] = []
    outcome = answer_simulate(ask(), lambda requests, at_s: said.append((requests, at_s)))
    assert {one.model for one in outcome.classes} == {"big"}
    assert outcome.actions > 0
    assert 4 < outcome.peak_gpus <= 6
    assert outcome.all.failed == 0
    assert to_json(outcome) == to_json(answer_simulate(ask()))
    assert [requests for requests, _ in said] == [250]


def test_fixed_workers_stay() -> None:
    outcome = answer_simulate(ask(workers="2p1d", fixed=True))
    assert outcome.actions == 0
    assert sorted(one.worker_id for one in outcome.workers if one.model == "big") == [
        "big-decode-0",
        "big-prefill-0",
        "big-prefill-1",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"workers": "2+1"}, "counts such as 2P3D"),
        ({"model": "other"}, "model other is not in policy, which has big, small"),
        ({"profiles": {}}, "small names no profile"),
        ({"policy_yaml": "gpu_budget: 0"}, "policy:1: gpu_budget: must be greater"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, object], message: str) -> None:
    fields = {name: getattr(ask(), name) for name in SimulateAsk.__struct_fields__} | wrong
    with pytest.raises(ConfigError) as caught:
        answer_simulate(SimulateAsk(**fields))
    assert message in caught.value.message
