"""How careful the planner is: as careful as the objective needs."""

from __future__ import annotations

import pytest

from planner.caution import Caution
from planner.demand import Demand
from planner.forecast import Forecast
from planner.objectives import Objective
from planner.observation import Traffic

SLO = {"realtime": Objective(ttft_s=1.0, itl_s=0.05, percentile=99.0)}
STEADY = Forecast(10.0, 12.0, 10.0)
RESTLESS = Forecast(10.0, 13.0, 10.0, excess=0.3)


def answered(in_time: int, late: int = 0, refused: int = 0) -> dict[str, Traffic]:
    part = Traffic(refused=refused)
    part.ttft.add(0.5, in_time)
    part.ttft.add(2.0, late)
    part.itl.add(0.02, in_time + late)
    return {"realtime": part}


def prepared(caution: Caution, forecast: Forecast) -> float:
    return caution.prepared(Demand(0.0, 1.0, 1.0), forecast).requests_per_s


def test_late_requests_beyond_the_objective_make_it_careful_quickly() -> None:
    caution = Caution()
    caution.add(answered(20, late=20), SLO)
    assert caution.level == 1.0
    assert prepared(caution, STEADY) == 12.0
    assert caution.margin > 1.05


def test_as_many_late_as_are_allowed_change_nothing() -> None:
    caution = Caution()
    before = caution.level
    for _ in range(50):
        caution.add(answered(198, late=2), SLO)
    assert abs(caution.level - before) < 1e-6


def test_after_many_in_time_less_is_prepared_for_but_only_where_forecasts_hold() -> None:
    caution = Caution()
    for _ in range(100):
        caution.add(answered(100), SLO)
    assert caution.level == -4.0, "some is saved"
    assert 8.9 < prepared(caution, STEADY) < 9.1
    assert prepared(caution, RESTLESS) == pytest.approx(10.0), "no less than is expected"
    assert caution.margin == 1.0


def test_refused_requests_are_late_ones_and_an_idle_interval_is_none() -> None:
    caution = Caution()
    before = caution.level
    caution.add({}, SLO)
    assert caution.level == before
    caution.add(answered(0, refused=5), SLO)
    assert caution.level > before
