"""What the replays of published results reckon with."""

from __future__ import annotations

import pytest

from benchmarks.published_planning import RATES_PER_S, STATIC, best_factor, h20
from benchmarks.published_routing import routed
from benchmarks.published_sweeps import Shape, keeps
from planner.scaling import Counts
from simulator.run import profile_named
from slipstream.performance import Predictor


def test_the_scaled_gpu_is_slower_by_the_data_sheets_ratios() -> None:
    known, scaled = Predictor(profile_named("qwen3-32b-h200-tp1")), Predictor(h20())
    assert scaled.prefill_s(4096) / known.prefill_s(4096) == pytest.approx(6.68, rel=0.01)
    assert scaled.decode_s(16, 1024) / known.decode_s(16, 1024) == pytest.approx(1.2)
    assert scaled.profile.blocks < known.profile.blocks


def test_rates_are_rescaled_to_where_the_static_splits_agree() -> None:
    curves = {
        counts: {rate * 1.2: value for rate, value in zip(RATES_PER_S, values, strict=True)}
        for counts, values in STATIC.items()
    }
    factor, difference = best_factor(curves)
    assert factor == pytest.approx(1.2)
    assert difference == pytest.approx(0.0, abs=1e-6)


def test_knowing_what_is_cached_never_finds_less_of_it() -> None:
    assert routed("global cache", 4.0, 150).hit_rate >= routed("random", 4.0, 150).hit_rate


def test_a_shape_keeps_its_limits_at_a_trickle_and_not_under_a_flood() -> None:
    shape = Shape("one", "qwen3-32b-h200-tp1", "qwen3-32b-h200-tp1", Counts(1, 1))
    assert keeps(shape, 1000, 50, 0.5)
    assert not keeps(shape, 4000, 50, 100.0)
