"""Profiles and what is predicted from them."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.errors import ConfigError
from slipstream.performance import (
    DecodePoint,
    Predictor,
    PrefillPoint,
    Profile,
    decode_profile,
    encode_profile,
    read_profile,
)

PROFILE = Profile(
    name="a",
    model="m",
    device="d",
    source="a test",
    measured_on="2026-01-01",
    prefill=(PrefillPoint(100, 0.02), PrefillPoint(1000, 0.11), PrefillPoint(4000, 0.56)),
    decode=tuple(DecodePoint(b, c, 0.01 + b * 0.001 + c * b * 1e-6) for b in (1, 8, 64) for c in (128, 4096)),
    block_tokens=16,
    block_bytes=1024,
    blocks=1000,
    step_tokens=512,
    max_running=64,
    max_model_len=8192,
    transfer_bytes_per_s=1e9,
    transfer_latency_s=0.001,
)
AT = Predictor(PROFILE)


def test_measured_points_are_predicted_exactly() -> None:
    for point in PROFILE.prefill:
        assert AT.prefill_s(point.tokens) == pytest.approx(point.seconds)
    for step in PROFILE.decode:
        assert AT.decode_s(step.batch, step.context_tokens) == pytest.approx(step.seconds)


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_a_prompt_in_two_chunks_costs_the_steps_that_it_has_more_and_nothing_else(first: int, second: int) -> None:
    steps = sum(math.ceil(tokens / PROFILE.step_tokens) for tokens in (first, second))
    more = steps - math.ceil((first + second) / PROFILE.step_tokens)
    whole = AT.prefill_s(first + second)
    assert AT.prefill_s(first) + AT.prefill_s(second, first) == pytest.approx(whole + more * AT.step_overhead_s)


def made_up(measured_in: int, points: tuple[int, ...] = (64, 200, 1000, 4000)) -> Profile:
    """10 ms a step and 0.1 ms a token, measured in steps of so many tokens."""
    prefill = tuple(PrefillPoint(n, 0.010 * math.ceil(n / measured_in) + 1e-4 * n) for n in points)
    return msgspec.structs.replace(PROFILE, prefill=prefill, prefill_step_tokens=measured_in)


@pytest.mark.parametrize("measured_in", [64, 150, 512, 4000])
def test_what_a_step_costs_is_told_from_what_tokens_cost_in_whatever_steps_that_was_measured(measured_in: int) -> None:
    predict = Predictor(made_up(measured_in))
    assert predict.step_overhead_s == pytest.approx(0.010)
    assert predict.prefill_s(4000) == pytest.approx(0.010 * math.ceil(4000 / 512) + 0.4)
    assert predict.chunk_s(100, 900) == pytest.approx(0.010)


def test_a_file_that_does_not_say_how_its_prompts_were_measured_is_of_its_own_steps() -> None:
    fields = msgspec.to_builtins(PROFILE)
    del fields["prefill_step_tokens"]
    old = decode_profile(msgspec.json.encode(fields))
    assert old.prefill_step_tokens == old.step_tokens == 512
    assert msgspec.structs.replace(old, step_tokens=64).prefill_step_tokens == 512, "what was measured stays"


@given(st.integers(0, 20000), st.integers(0, 20000), st.integers(1, 5000))
def test_more_tokens_never_take_less_time(context: int, new: int, more: int) -> None:
    assert AT.prefill_s(new + more, context) >= AT.prefill_s(new, context)


@given(st.integers(1, 1000), st.integers(0, 100_000))
def test_a_decode_step_takes_time_everywhere(batch: int, context: int) -> None:
    assert 0 < AT.decode_s(batch, context) <= AT.decode_s(batch + 1, context) + 1e-12


def test_a_mixed_step_costs_the_decode_step_and_the_chunks_tokens() -> None:
    assert AT.step_s([(256, 0)], 8, 1000) == pytest.approx(AT.decode_s(8, 1000) + AT.chunk_s(256, 0))
    assert AT.step_s([(256, 0)], 0, 0) == pytest.approx(AT.prefill_s(256))


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(encode_profile(PROFILE))
    assert read_profile(file) == PROFILE


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("prefill", [{"tokens": 5, "seconds": 1.0}], "prefill"),
        ("prefill", [{"tokens": 5, "seconds": 1.0}, {"tokens": 5, "seconds": 2.0}], "prefill"),
        ("prefill", [{"tokens": 5, "seconds": 1.0}, {"tokens": 6, "seconds": -2.0}], "seconds"),
        ("decode", [], "decode"),
        (
            "decode",
            [{"batch": 1, "context_tokens": 1, "seconds": 1}, {"batch": 2, "context_tokens": 3, "seconds": 1}],
            "decode",
        ),
        ("blocks", 0, "blocks"),
        ("transfer_bytes_per_s", "fast", "transfer_bytes_per_s"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, field: str, value: object, word: str) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(msgspec.to_builtins(PROFILE) | {field: value}))
    with pytest.raises(ConfigError, match=word):
        read_profile(file)


@pytest.mark.parametrize("content", [b"", b"[", b"\xff"])
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="profile"):
        read_profile(file)
    with pytest.raises(msgspec.DecodeError):
        decode_profile(content)
