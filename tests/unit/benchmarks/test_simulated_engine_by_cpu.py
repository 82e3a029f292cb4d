"""The simulated half of the comparison by the CPU's clock."""

from __future__ import annotations

import pytest

from benchmarks.arrivals import Arrival
from benchmarks.simulated_engine_by_cpu import simulate
from tests.unit.engine.simulated.profiles import PROFILE


def test_requests_are_simulated_at_their_times() -> None:
    # 0.01 s a step and 0.001 s a token for prompts, 0.005 s for each token after the first.
    means = simulate(PROFILE, [Arrival(0.0, range(10)), Arrival(5.0, range(20, 30))], 3)
    assert means.ttft_ms == pytest.approx(20.0)
    assert means.itl_ms == pytest.approx(5.0)
    assert means.busy_s == pytest.approx(2 * 0.03)
    assert means.steps == 6
