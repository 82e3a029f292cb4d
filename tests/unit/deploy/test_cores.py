"""How CPUs are divided among workers."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from deploy.cores import divide, physical_cores


def test_two_workers_on_two_cpus_get_one_each() -> None:
    assert divide([(0,), (1,)], 2) == [(0,), (1,)]


def test_the_threads_of_one_physical_core_stay_together() -> None:
    assert divide([(0, 4), (1, 5), (2, 6), (3, 7)], 2) == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_physical_cores_are_split_when_there_are_too_few_of_them() -> None:
    assert divide([(0, 2), (1, 3)], 4) == [(0,), (2,), (1,), (3,)]


def test_there_is_nothing_to_divide_for_one_worker_or_too_few_cpus() -> None:
    assert divide([(0,), (1,)], 1) is None
    assert divide([(0,)], 2) is None


@given(st.integers(1, 64), st.integers(2, 16))
def test_shares_are_disjoint_complete_and_even(cpus: int, shares: int) -> None:
    divided = divide([(cpu,) for cpu in range(cpus)], shares)
    if divided is None:
        assert cpus < shares
        return
    assert sorted(cpu for share in divided for cpu in share) == list(range(cpus))
    assert max(map(len, divided)) - min(map(len, divided)) <= 1


def test_cores_are_read_as_the_kernel_tells_them(tmp_path: Path) -> None:
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cores([3, 2, 1, 0, 9], tmp_path) == [(0, 2), (1, 3), (9,)]
