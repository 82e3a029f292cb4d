"""What is set for an engine before it is imported: the threads of tensor-parallel ranks."""

from __future__ import annotations

import pytest

from engine.environment import rank_threads

EIGHT = range(8)


@pytest.mark.parametrize(
    ("ranks", "threads", "cpus", "bound"),
    [
        (2, None, EIGHT, "0,1,2,3|4,5,6,7"),
        (2, 4, EIGHT, "0,1|4,5"),
        (2, 2, [4, 9], "4|9"),
        (4, None, range(6), "0|1|3|4"),
    ],
)
def test_each_rank_has_cpus_of_its_own(ranks: int, threads: int | None, cpus: list[int], bound: str) -> None:
    assert rank_threads(ranks, threads, cpus) == {"VLLM_CPU_OMP_THREADS_BIND": bound}


@pytest.mark.parametrize(("threads", "each"), [(None, "1"), (1, "1"), (8, "2")])
def test_where_there_are_too_few_they_are_bound_to_none(threads: int | None, each: str) -> None:
    assert rank_threads(4, threads, [0, 1]) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": each}
