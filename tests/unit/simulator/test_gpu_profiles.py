"""The profiles that are shipped: complete, readable, and what their source says."""

from __future__ import annotations

import pytest

from simulator.gpu_profiles import FOLDER, that_fit
from slipstream.performance import Predictor, read_profile

NAMES = [f"{model.label}-{gpu.label}-tp{gpus}" for model, gpu, gpus in that_fit()]


def test_models_that_do_not_fit_have_no_profile() -> None:
    assert "llama-3.1-70b-h100-tp1" not in NAMES
    assert {"llama-3.1-70b-h200-tp1", "qwen3-32b-h100-tp1", "qwen2.5-72b-h200-tp8"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_profile_names_its_source_and_predicts_rising_times(name: str) -> None:
    profile = read_profile(FOLDER / f"{name}.json")
    predict = Predictor(profile)
    assert profile.name == name
    assert "aiconfigurator==" in profile.source
    seconds = [predict.prefill_s(tokens) for tokens in (128, 1024, 8192, 65536)]
    assert seconds == sorted(seconds)
    assert predict.decode_s(64, 4096) > predict.decode_s(1, 4096) > 0


@pytest.mark.parametrize(
    ("name", "tokens", "prefill_ms"),
    [
        ("qwen2.5-72b-h200-tp1", 4096, 505 * 4096 / 4000),
        ("qwen3-32b-h100-tp1", 1024, 68 * 1024 / 1000),
        ("qwen3-32b-h100-tp4", 16384, 493 * 16384 / 16000),
    ],
)
def test_the_tables_are_those_that_were_published(name: str, tokens: int, prefill_ms: float) -> None:
    predict = Predictor(read_profile(FOLDER / f"{name}.json"))
    assert predict.prefill_s(tokens) * 1e3 == pytest.approx(prefill_ms, rel=0.1)
