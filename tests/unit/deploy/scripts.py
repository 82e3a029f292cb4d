"""Tiny real programs that play components, and what tests of the launcher ask about processes."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from deploy.processes import Component

# Writes its pid and that of a child of its own once both run; notes when it is asked to end. Arguments: name, folder,
# and the seconds that it takes to end ("never" to ignore the request).
WORKER = """
import os, signal, subprocess, sys, time
name, folder, ending_s = sys.argv[1:]
grandchild = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
def end(signum, frame):
    with open(f"{folder}/ends", "a") as ends:
        ends.write(f"{name}\\n")
    if ending_s != "never":
        time.sleep(float(ending_s))
        os._exit(0)
signal.signal(signal.SIGTERM, end)
with open(f"{folder}/{name}.tmp", "w") as file:
    file.write(f"{os.getpid()} {grandchild.pid}")
os.rename(f"{folder}/{name}.tmp", f"{folder}/{name}.pids")
print("worker", name, "runs", flush=True)
while True:
    time.sleep(0.1)
"""

DYING = """
import sys
print("loading the weights", flush=True)
sys.exit("no space left for weights")
"""

TIMEOUT_S = 30.0


def worker(
    name: str,
    folder: Path,
    *,
    ending_s: str = "0",
    stop_stage: int = 0,
    essential: bool = False,
    cpus: tuple[int, ...] = (),
) -> Component:
    return script(
        name, folder, WORKER, name, str(folder), ending_s, stop_stage=stop_stage, essential=essential, cpus=cpus
    )


def script(
    name: str,
    folder: Path,
    source: str,
    *arguments: str,
    stop_stage: int = 0,
    essential: bool = False,
    cpus: tuple[int, ...] = (),
) -> Component:
    return Component(
        name=name,
        argv=(sys.executable, "-I", "-S", "-c", source, *arguments),
        environ=dict(os.environ),
        log_path=folder / f"{name}.log",
        stop_stage=stop_stage,
        essential=essential,
        cpus=cpus,
    )


def pids_of(name: str, folder: Path) -> list[int]:
    """The worker's own pid and its child's; empty before it has started."""
    file = folder / f"{name}.pids"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s, f"never came true: {what}"
        time.sleep(0.02)


async def until(condition: Callable[[], object]) -> None:
    """As `wait_until`, on the event loop and without a deadline of its own."""
    while not condition():  # noqa: ASYNC110 - another process makes it true
        await asyncio.sleep(0.02)
