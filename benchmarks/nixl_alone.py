"""NIXL by itself between two processes, as it ships: its progress threads on, one WRITE of one piece of memory.

    python -m benchmarks.nixl_alone SIZES_BYTES ROUNDS IDLE_S     what `measure` runs: a process of its own, JSON out

It is what the nixl transport is compared with. Nothing is checked and nothing is scattered.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from slipstream.errors import UnavailableError

_TIMEOUT_S = 240.0
_WRITE_S = 30.0
_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class Seen:
    """By size in bytes: seconds of each WRITE, and CPU-seconds of both processes in all. `idle_cores`: of both."""

    sizes: dict[int, tuple[list[float], float]]
    idle_cores: float


def measure(sizes: Sequence[int], rounds: int, idle_s: float) -> Seen:
    """Run it.

    Raises:
        UnavailableError: NIXL does not work here, in its own words.
    """
    argv = [sys.executable, "-m", "benchmarks.nixl_alone", json.dumps(list(sizes)), str(rounds), str(idle_s)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"NIXL alone took longer than {_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise UnavailableError(f"NIXL alone failed: {done.stderr.strip().splitlines()[-1:]}")
    seen = json.loads(done.stdout.splitlines()[-1])
    return Seen({int(size): (samples, cpu_s) for size, (samples, cpu_s) in seen["sizes"].items()}, seen["idle_cores"])


def _agent(name: str) -> Any:
    from nixl_cu13 import _api as nixl

    return nixl.nixl_agent(f"{name}-{os.getpid()}", nixl.nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))


def _memory(length: int) -> tuple[mmap.mmap, int]:
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    return mapped, ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def _target(length: int) -> None:
    _mapped, address = _memory(length)
    agent = _agent("target")
    agent.register_memory([(address, length, 0, "")], "DRAM")
    _say([agent.get_agent_metadata().hex(), address])
    agent.add_remote_agent(bytes.fromhex(sys.stdin.readline().strip()))
    sys.stdin.read()


def _initiator(sizes: list[int], rounds: int, idle_s: float) -> None:
    length = max(sizes)
    argv = [sys.executable, "-m", "benchmarks.nixl_alone", "target", str(length)]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    _mapped, address = _memory(length)
    agent = _agent("initiator")
    agent.register_memory([(address, length, 0, "")], "DRAM")
    metadata, remote_address = _hello(child)
    child.stdin.write(agent.get_agent_metadata().hex() + "\n")
    child.stdin.flush()
    peer = agent.add_remote_agent(bytes.fromhex(metadata))
    processes = [psutil.Process(), psutil.Process(child.pid)]
    seen: dict[int, tuple[list[float], float]] = {}
    for size in sizes:
        _write(agent, peer, address, remote_address, size)
        samples, cpu_s = [], 0.0
        for _ in range(max(rounds, min(25, rounds * (64 << 20) // size))):
            time.sleep(_PAUSE_S)  # as before each handoff that it is compared with
            before_s, began_s = _cpu_s(processes), time.perf_counter()
            _write(agent, peer, address, remote_address, size)
            samples.append(time.perf_counter() - began_s)
            cpu_s += _cpu_s(processes) - before_s
        seen[size] = (samples, cpu_s)
    before_s = _cpu_s(processes)
    time.sleep(idle_s)
    _say({"sizes": seen, "idle_cores": (_cpu_s(processes) - before_s) / idle_s})
    child.kill()
    os._exit(0)  # NIXL's threads do not always end by themselves


def _hello(child: subprocess.Popen[str]) -> tuple[str, int]:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("["):
            metadata, address = json.loads(line)
            return str(metadata), int(address)
    raise UnavailableError("the target ended")


def _write(agent: Any, peer: str, address: int, remote_address: int, size: int) -> None:
    here = agent.get_xfer_descs([(address, size, 0)], "DRAM")
    there = agent.get_xfer_descs([(remote_address, size, 0)], "DRAM")
    handle = agent.initialize_xfer("WRITE", here, there, peer)
    state = agent.transfer(handle)
    until_s = time.monotonic() + _WRITE_S
    while state == "PROC":
        state = agent.check_xfer_state(handle)
        if time.monotonic() > until_s:
            raise UnavailableError(f"a WRITE of {size} bytes took longer than {_WRITE_S:g} s")
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise UnavailableError(f"a WRITE ended as {state}")


def _cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "target":
        _target(int(sys.argv[2]))
    else:
        _initiator(json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
