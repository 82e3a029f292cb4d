"""Where threads may run: read and set on a real process with real threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import affinity

# Two threads that wait, in a process and in one that it has started.
_PROGRAM = """
import subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, "child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    program = tmp_path_factory.mktemp("program") / "threads.py"
    program.write_text(_PROGRAM)
    argv = [sys.executable, str(program)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.stdin.close()  # both end


def test_every_thread_of_every_process_is_confined(tree: int) -> None:
    cpu = min(os.sched_getaffinity(0))

    affinity.confine(tree, {cpu})

    assert affinity.threads_by_cpus(tree) == {str(cpu): 4}


def test_a_thread_that_was_moved_away_is_seen(tree: int) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    affinity.confine(tree, {cpus[0]})

    os.sched_setaffinity(tree, {cpus[1]})  # one thread alone, as the connector does

    assert affinity.threads_by_cpus(tree) == {str(cpus[0]): 3, str(cpus[1]): 1}


def test_the_busiest_threads_come_first_and_no_more_than_asked_for(tree: int) -> None:
    busiest = affinity.busiest_threads(tree, 3)

    assert len(busiest) == 3
    assert busiest == sorted(busiest, key=lambda thread: thread.cpu_s, reverse=True)


def test_a_process_that_has_ended_has_no_threads() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()

    assert affinity.threads_by_cpus(process.pid) == {}
    affinity.confine(process.pid, {0})


def test_cpus_are_written_as_the_kernel_does() -> None:
    assert affinity.span({0, 1, 2, 3, 8, 10, 11}) == "0-3,8,10-11"


@given(st.sets(st.integers(min_value=0, max_value=300)))
def test_written_cpus_name_each_one_once(cpus: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, affinity.span(cpus).split(",")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)

    assert named == sorted(cpus)
