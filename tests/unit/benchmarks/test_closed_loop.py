"""Clients that wait for their answers, in virtual time."""

from __future__ import annotations

import pytest

from benchmarks.closed_loop import Load, aggregated, disaggregated
from slipstream.performance import DecodePoint, Predictor, PrefillPoint, Profile

PROFILE = Profile(
    name="plain",
    model="none",
    device="none",
    source="made up",
    measured_on="2026-01-01",
    prefill=(PrefillPoint(100, 0.1), PrefillPoint(10_000, 10.0)),
    decode=(DecodePoint(1, 100, 0.01), DecodePoint(100, 100, 0.01)),
    block_tokens=16,
    block_bytes=16,
    blocks=10_000,
    step_tokens=100,
    max_running=100,
    max_model_len=10_000,
    transfer_bytes_per_s=1e12,
    transfer_latency_s=0.0,
)
"""A millisecond a prompt token, ten a step."""


def test_a_lone_client_waits_for_nobody() -> None:
    got = aggregated(Predictor(PROFILE), Load(100, 11, clients=1, requests=5))
    assert got.ttft_s == pytest.approx(0.1)
    assert got.tpot_s == pytest.approx(0.01)


def test_two_clients_wait_for_each_others_prompts() -> None:
    got = aggregated(Predictor(PROFILE), Load(100, 11, clients=2, requests=20))
    assert got.tpot_s > 0.011
    assert got.ttft_s >= 0.1


def test_handed_over_prompts_do_not_hold_up_answers() -> None:
    load = Load(100, 11, clients=2, requests=20)
    got = disaggregated((PROFILE, PROFILE), (1, 1), load)
    assert got.tpot_s < aggregated(Predictor(PROFILE), load).tpot_s
    assert got.tpot_s == pytest.approx(0.01, rel=0.2)


def test_every_request_is_asked_once() -> None:
    load = Load(100, 10, clients=3, requests=10, least_share=0.5, turn_s=0.01)
    lengths = list(load.lengths())
    assert len(lengths) == 10
    assert all(50 <= prompt <= 100 and 5 <= answer <= 10 for prompt, answer in lengths)
    assert lengths == list(load.lengths())
