"""The smallest pool for a load, with prefill workers and without, and which is better."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.objectives import Objective
from planner.scaling import Counts
from simulator.chosen_load import load_of
from simulator.load_choice import LoadChoice
from simulator.pool_trials import Pool, Trials, smallest
from simulator.recommend import Recommendation, recommend
from simulator.what_if import profiles_of
from slipstream.errors import ConfigError

(TP1,) = profiles_of(("qwen3-32b-h200-tp1",))


def searched(objective: Objective, max_gpus: int = 16, **choice: object) -> tuple[Recommendation, list[Pool]]:
    seen: list[Pool] = []
    load = load_of(LoadChoice(requests=80, **choice))  # type: ignore[arg-type]
    return recommend(load, objective, [TP1], max_gpus=max_gpus, said=seen.append), seen


@given(st.integers(1, 60), st.integers(0, 80), st.integers(1, 60), st.integers(1, 60))
def test_the_smallest_is_found_wherever_one_begins(least: int, wanted: int, start: int, most: int) -> None:
    asked: list[int] = []

    def will_do(number: int) -> bool:
        asked.append(number)
        return number >= wanted

    found = smallest(will_do, start, least, most)
    answer = max(wanted, least)
    assert found == (answer if answer <= most else None)
    assert all(least <= number <= most for number in asked)
    assert len(asked) <= 14


def test_little_traffic_needs_one_aggregated_worker() -> None:
    answer, _ = searched(Objective(2.0, 0.05), rate_per_s=0.5)
    assert answer.better == "aggregated"
    assert answer.aggregated is not None
    assert answer.disaggregated is not None
    assert (answer.aggregated.workers, answer.disaggregated.workers) == ("1 aggregated", "1P1D")
    assert "does with 1 GPU" in answer.because
    assert answer.aggregated.margin > 1.5


def test_long_prompts_and_a_tight_itl_are_worth_disaggregation() -> None:
    answer, seen = searched(Objective(2.0, 0.03), rate_per_s=8.0, input_tokens=3000.0, output_tokens=300.0)
    assert answer.better == "disaggregated"
    assert answer.disaggregated is not None
    assert answer.aggregated is not None
    assert answer.disaggregated.meets
    assert answer.disaggregated.gpus < answer.aggregated.gpus
    # One worker less in either role would not do, and was tried or lies beyond something that was.
    smaller = [pool for pool in seen if pool.kind == "disaggregated" and pool.gpus < answer.disaggregated.gpus]
    assert smaller
    assert not any(pool.meets for pool in smaller)
    assert answer.simulations >= len(seen)


def test_what_cannot_be_met_is_said_with_what_comes_nearest() -> None:
    answer, _ = searched(Objective(0.001, 0.05), max_gpus=3)
    assert answer.better == "none"
    assert "nothing within 3 GPUs meets the objective" in answer.because
    assert "0.0% of the first tokens" in answer.because


def test_workers_that_do_not_fit_are_no_answer() -> None:
    (tp4,) = profiles_of(("qwen3-32b-h200-tp4",))
    load = load_of(LoadChoice(requests=50))
    answer = recommend(load, Objective(2.0, 0.05), [tp4], max_gpus=4)
    assert answer.disaggregated is None  # two workers of four GPUs
    assert answer.better == "aggregated"
    assert recommend(load, Objective(2.0, 0.05), [tp4], max_gpus=3).better == "none"


def test_a_split_gives_a_worker_to_the_role_that_falls_behind() -> None:
    load = load_of(LoadChoice(requests=120, rate_per_s=8.0, input_tokens=3000.0, output_tokens=300.0))
    trials = Trials(TP1, load, 15.0, Objective(2.0, 0.03))
    assert trials.split(3, 1).counts == Counts(2, 1)
    assert trials.count == 2
    assert trials.split(3, 1).counts == Counts(2, 1)
    assert trials.count == 2  # each is simulated once


def test_profiles_are_chosen_by_name_or_by_model_and_gpu() -> None:
    assert [one.tensor_parallel for one in profiles_of(("qwen3-32b-h200",))][:3] == [1, 2, 4]
    assert [one.name for one in profiles_of(("smollm2-cpu",))] == ["smollm2-cpu"]
    with pytest.raises(ConfigError, match=r"packaged are .*qwen3-32b-h200-tp1"):
        profiles_of(("qwen3-32b-h999",))
