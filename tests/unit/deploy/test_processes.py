"""One child process: where it runs, and how its end is told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from deploy.processes import Process, describe_exit, log_tail
from tests.unit.deploy.scripts import TIMEOUT_S, pids_of, runs, script, until, worker


async def test_a_component_stays_on_its_cpus(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    process = Process.spawn(worker("decode-0", tmp_path, cpus=(cpu,)))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await until(lambda: pids_of("decode-0", tmp_path))
        assert psutil.Process(process.pid).cpu_affinity() == [cpu]
    finally:
        process.kill()
        await process.wait()


async def test_nothing_of_its_group_is_left_once_it_has_ended(tmp_path: Path) -> None:
    process = Process.spawn(worker("decode-0", tmp_path))
    async with asyncio.timeout(TIMEOUT_S):
        await until(lambda: pids_of("decode-0", tmp_path))
        process.ask_to_end()
        assert await process.wait() == 0
    assert not any(runs(pid) for pid in pids_of("decode-0", tmp_path))


async def test_what_it_has_started_may_end_in_order_after_it(tmp_path: Path) -> None:
    note = tmp_path / "cleaned"
    tidy = f"import sys, time; sys.stdin.read(); time.sleep(0.2); open({str(note)!r}, 'w')"
    source = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {tidy!r}], stdin=subprocess.PIPE)"
    async with asyncio.timeout(TIMEOUT_S):
        assert await Process.spawn(script("parent", tmp_path, f"{source}; os._exit(0)")).wait() == 0
    assert note.exists()


async def test_giving_up_a_wait_does_not_disturb_the_process(tmp_path: Path) -> None:
    process = Process.spawn(script("sleeper", tmp_path, "import time; time.sleep(600)"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await process.wait()
    assert runs(process.pid)
    process.kill()
    assert await process.wait() == -9
    process.kill()  # after its end it does nothing


async def test_both_output_streams_are_appended_to_the_log(tmp_path: Path) -> None:
    source = "import sys; print('out', flush=True); print('err', file=sys.stderr)"
    for _ in range(2):
        assert await Process.spawn(script("twice", tmp_path, source)).wait() == 0
    assert (tmp_path / "twice.log").read_text() == "out\nerr\nout\nerr\n"


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-11, "was killed by SIGSEGV"),
        (-9, "was killed by SIGKILL (was there enough memory?)"),
        (-40, "was killed by signal 40"),
    ],
)
def test_how_it_ended_is_said_in_words(returncode: int, words: str) -> None:
    assert describe_exit(returncode) == words


def test_the_tail_of_a_long_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    log.write_text("\n".join(f"line {number}" for number in range(100_000)))
    assert log_tail(log, lines=2) == "line 99998\nline 99999"
    assert log_tail(tmp_path / "none.log") == ""
