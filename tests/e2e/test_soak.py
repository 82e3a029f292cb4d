"""A soak of some seconds: the loads, the books and the counts of `benchmarks.soak`, which takes an hour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks import soak_watch
from benchmarks.goodput import ANSWERED, FAILED
from benchmarks.offered_load import Lengths
from benchmarks.open_load import LEFT
from benchmarks.report import machine
from benchmarks.soak import SIMULATED, soak

SECONDS = 6.0


async def test_after_a_load_of_all_kinds_nothing_is_held_and_nothing_has_grown(tmp_path: Path) -> None:
    world = replace(SIMULATED, prefill=1, decode=1, lengths=Lengths((16, 128), (4, 16)))
    report = await soak(
        world,
        SECONDS / 60,
        8.0,
        machine(),
        tmp_path,
        lambda _: None,
        first_s=3.0,
        settle_s=0.5,
        every_s=0.5,
    )
    assert report.failures == {}
    assert FAILED not in report.outcomes
    assert report.outcomes[ANSWERED] > 20
    assert report.outcomes[LEFT] > 0
    assert soak_watch.still_held(report.held_after) == {}
    tasks = "frontend slipstream_frontend_tasks"
    assert report.held_after[tasks] <= report.held_before[tasks] + 2, "one for each connection that is still open"
    names = {one.process for one in report.processes}
    assert {"frontend", "planner", "prefill-0", "decode-0"} <= names
    for one in report.processes:
        assert one.before is not None
        assert one.after is not None
        assert one.after.fds <= one.before.fds + 4, one.process
        assert one.memory_mib > 10, "it is a Python process"
