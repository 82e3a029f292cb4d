from __future__ import annotations

import signal
import subprocess
import sys

_WAITS = """
import time
from slipstream import telemetry
from slipstream.settings import LogSettings
telemetry.configure(LogSettings(), component="test")
def stands_still():
    print("ready", flush=True)
    time.sleep(60)
stands_still()
"""


def test_a_process_that_stands_still_tells_where_and_lives_on() -> None:
    process = subprocess.Popen([sys.executable, "-c", _WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        try:
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGUSR1)
            said = b""
            while b"in stands_still" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            assert process.poll() is None
        finally:
            process.kill()
