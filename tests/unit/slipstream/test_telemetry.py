"""The quick way of writing a line says what the usual way says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

TELL_TWICE = """
import sys
import structlog
from slipstream import telemetry
from slipstream.settings import LogSettings

telemetry.configure(LogSettings(format=sys.argv[1], level=sys.argv[2]), component="frontend")
structlog.contextvars.bind_contextvars(request_id="r1")
fields = {"model": "tiny", "total_s": 1.5, "workers": ("d0",), "text": "two words"}
telemetry.get_logger("frontend.access_log").info("request", **fields)
telemetry.tell("frontend.access_log", "request", fields)
"""


def lines(log_format: str, level: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", TELL_TWICE, log_format, level], capture_output=True, text=True, timeout=60, check=True
    )
    return [re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "NOW", line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_line_that_is_told_is_the_line_that_is_logged(log_format: str) -> None:
    logged, told = lines(log_format, "info")
    if log_format == "console":
        assert logged == told
    else:
        assert sorted(logged.strip("{}").split(", ")) == sorted(told.strip("{}").split(", "))


def test_nothing_is_told_below_the_level() -> None:
    assert lines("console", "warning") == []


ON_A_FULL_DISK = """
import os
import sys
from slipstream import lossy_streams, telemetry
from slipstream.settings import LogSettings

os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
lossy_streams.install()
telemetry.configure(LogSettings(), component="frontend")
print("what a library prints", file=sys.stderr, flush=True)
for _ in range(3):
    telemetry.tell("frontend.access_log", "request", {"model": "tiny"})
    telemetry.get_logger("frontend").error("something")
print("served on", flush=True)
os._exit(0)
"""


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", ON_A_FULL_DISK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "served on\n")
