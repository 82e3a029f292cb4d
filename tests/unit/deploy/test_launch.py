"""A local cluster comes up whole or not at all, and never leaves a process behind."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from deploy.launch import UntilReady, launch
from deploy.processes import Component
from deploy.supervisor import Report, RestartPolicy
from slipstream.errors import StartupError
from tests.unit.deploy.scripts import DYING, TIMEOUT_S, pids_of, runs, script, until, wait_until, worker

NAMES = ("frontend", "decode-0", "control-plane")


@contextmanager
def launcher(folder: Path, ending_s: str = "0", stop_timeout_s: float = 20.0) -> Iterator[subprocess.Popen[str]]:
    """A launcher process whose three components all run, each with a child of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.deploy.launcher_program", str(folder), ending_s, str(stop_timeout_s)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until((folder / "ready").exists, "the launcher is ready")
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
        for pid in filter(runs, all_pids(folder)):
            os.kill(pid, signal.SIGKILL)


def all_pids(folder: Path) -> list[int]:
    return [pid for name in NAMES for pid in pids_of(name, folder)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_ends_everything_in_order_and_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    with launcher(tmp_path) as process:
        assert all(runs(pid) for pid in all_pids(tmp_path))
        process.send_signal(signum)
        assert process.wait(TIMEOUT_S) == 1
        assert [pid for pid in all_pids(tmp_path) if runs(pid)] == []
    assert (tmp_path / "ends").read_text().split() == list(NAMES)


def test_kill_9_of_the_launcher_takes_its_children_with_it(tmp_path: Path) -> None:
    with launcher(tmp_path) as process:
        children = [pids_of(name, tmp_path)[0] for name in NAMES]
        process.kill()
        wait_until(lambda: not any(runs(pid) for pid in children), "the children have died with the launcher")


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    with launcher(tmp_path, ending_s="never", stop_timeout_s=3600) as process:
        process.send_signal(signal.SIGINT)
        wait_until((tmp_path / "ends").exists, "the first component was asked to end")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.6)  # within this time a second signal is taken for the first one's echo
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 1
        assert [pid for pid in all_pids(tmp_path) if runs(pid)] == []


def test_a_signal_that_arrives_twice_at_once_still_stops_gracefully(tmp_path: Path) -> None:
    with launcher(tmp_path, ending_s="0.1") as process:
        process.send_signal(signal.SIGTERM)
        wait_until((tmp_path / "ends").exists, "the first component was asked to end")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 1
    assert (tmp_path / "ends").read_text().split() == list(NAMES)


def test_what_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    with launcher(tmp_path, ending_s="never", stop_timeout_s=0.3) as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert "not ended within 0.3 s; killing" in errors
        assert [pid for pid in all_pids(tmp_path) if runs(pid)] == []


def test_a_terminals_interrupt_does_not_reach_the_children(tmp_path: Path) -> None:
    with launcher(tmp_path) as process:
        sessions = {os.getsid(pids_of(name, tmp_path)[0]) for name in NAMES}
        assert os.getsid(process.pid) not in sessions
        assert len(sessions) == len(NAMES)


async def run(
    components: list[Component],
    ready: UntilReady,
    *,
    ready_timeout_s: float = TIMEOUT_S,
    output: io.StringIO | None = None,
) -> str:
    async def body() -> str:
        return "done"

    return await launch(
        components,
        ready,
        body,
        console=Console(file=output or io.StringIO(), width=200),
        ready_timeout_s=ready_timeout_s,
        stop_timeout_s=20,
    )


async def test_the_result_is_the_bodys_and_all_processes_have_ended_by_then(tmp_path: Path) -> None:
    async def ready(report: Report) -> None:
        await until(lambda: pids_of("decode-0", tmp_path))

    assert await run([worker("decode-0", tmp_path)], ready) == "done"
    assert not any(runs(pid) for pid in pids_of("decode-0", tmp_path))


async def test_a_child_that_dies_while_starting_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    async def never(report: Report) -> None:
        await asyncio.Event().wait()

    components = [worker("prefill-0", tmp_path), script("decode-0", tmp_path, DYING)]
    with pytest.raises(StartupError, match="decode-0 ended with exit code 1 while starting") as caught:
        await run(components, never)
    assert caught.value.message.endswith("loading the weights\nno space left for weights")
    assert not any(runs(pid) for pid in pids_of("prefill-0", tmp_path))


async def test_a_command_that_does_not_exist_is_reported_in_the_same_way(tmp_path: Path) -> None:
    missing = Component("frontend", ("/no/such/program",), {}, tmp_path / "frontend.log")

    async def never(report: Report) -> None:
        await asyncio.Event().wait()

    with pytest.raises(StartupError, match="cannot start /no/such/program: No such file"):
        await run([missing], never)


async def test_a_component_that_is_late_is_named(tmp_path: Path) -> None:
    async def half_ready(report: Report) -> None:
        report("frontend", "ready")
        report("decode-0", "loading")
        await asyncio.Event().wait()

    components = [worker("frontend", tmp_path), worker("decode-0", tmp_path)]
    with pytest.raises(StartupError, match=r"ready_timeout_s = 0\.2 s: decode-0 \(loading\);"):
        await run(components, half_ready, ready_timeout_s=0.2)


async def test_an_error_in_the_body_stops_everything(tmp_path: Path) -> None:
    async def ready(report: Report) -> None:
        await until(lambda: pids_of("decode-0", tmp_path))

    async def failing() -> None:
        raise StartupError("the question had no answer")

    with pytest.raises(StartupError, match="no answer"):
        await launch(
            [worker("decode-0", tmp_path)],
            ready,
            failing,
            console=Console(file=io.StringIO()),
            ready_timeout_s=TIMEOUT_S,
            stop_timeout_s=20,
        )
    assert not any(runs(pid) for pid in pids_of("decode-0", tmp_path))


async def test_without_a_terminal_each_change_is_one_line(tmp_path: Path) -> None:
    async def ready(report: Report) -> None:
        report("decode-0", "loading")
        report("decode-0", "loading")
        report("decode-0", "ready")

    output = io.StringIO()
    await run([worker("decode-0", tmp_path)], ready, output=output)
    states = [line.split(": ")[1].strip() for line in output.getvalue().splitlines()]
    assert states == ["starting", "loading", "ready", "stopping"]


async def test_a_worker_that_dies_later_is_restarted(tmp_path: Path) -> None:
    async def ready(report: Report) -> None:
        await until(lambda: pids_of("decode-0", tmp_path))

    async def kill_it_and_wait_for_the_next() -> list[int]:
        first = pids_of("decode-0", tmp_path)
        os.kill(first[0], signal.SIGKILL)
        await until(lambda: pids_of("decode-0", tmp_path) != first)
        assert not any(runs(pid) for pid in first)  # what the dead one had started is gone too
        return pids_of("decode-0", tmp_path)

    output = io.StringIO()
    second = await launch(
        [worker("decode-0", tmp_path)],
        ready,
        kill_it_and_wait_for_the_next,
        console=Console(file=output, width=200),
        ready_timeout_s=TIMEOUT_S,
        stop_timeout_s=20,
        policy=RestartPolicy(first_delay_s=0.01),
    )
    assert not any(runs(pid) for pid in second)
    assert "decode-0: died: was killed by SIGKILL (was there enough memory?); restarting in 0.01 s" in output.getvalue()
    assert "decode-0: restarted: restart 1" in output.getvalue()


@pytest.mark.parametrize("essential", [True, False])
async def test_what_keeps_dying_is_given_up_and_ends_the_run_only_when_it_is_essential(
    tmp_path: Path, essential: bool
) -> None:
    output = io.StringIO()
    flaky = script("flaky", tmp_path, "import time; time.sleep(0.2)", essential=essential)
    other = worker("frontend", tmp_path, essential=True)

    async def ready(report: Report) -> None:
        await until(lambda: pids_of("frontend", tmp_path))

    async def until_given_up() -> str:
        await until(lambda: "given up" in output.getvalue())
        await asyncio.sleep(0.05)
        return "still serving"

    async def run_it() -> str:
        return await launch(
            [flaky, other],
            ready,
            until_given_up,
            console=Console(file=output, width=200),
            ready_timeout_s=TIMEOUT_S,
            stop_timeout_s=20,
            policy=RestartPolicy(limit=2, first_delay_s=0.01),
        )

    if essential:
        with pytest.raises(StartupError, match="flaky ended with exit code 0, after 2 restarts"):
            await run_it()
    else:
        assert await run_it() == "still serving"
    assert not any(runs(pid) for pid in pids_of("frontend", tmp_path))
