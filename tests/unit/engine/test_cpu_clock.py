"""The clock that runs while this process computes."""

from __future__ import annotations

import subprocess
import sys
import time

from engine.cpu_clock import cpu_seconds

DEADLINE_S = 20.0


def test_it_runs_while_this_process_computes() -> None:
    began, until_s = cpu_seconds(), time.monotonic() + DEADLINE_S
    while cpu_seconds() < began + 0.02:
        assert time.monotonic() < until_s


def test_a_child_counts_too() -> None:
    began, until_s = cpu_seconds(), time.monotonic() + DEADLINE_S
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        while cpu_seconds() < began + 0.2:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        child.kill()
