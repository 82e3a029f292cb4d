"""`python -m benchmarks.transfer`: how fast the transfer service moves KV blocks between two processes of this machine.

A sender and a receiver, each a real transfer agent over a made-up KV cache (256 blocks of 1 MiB in 8 regions), and for
every transport the same handoffs: 1, 16 and 256 MiB, from the moment the last piece is computed to the moment the
receiver has checked all of them, digests included. Beside them, in the same rounds: `memcpy` and `process_vm_readv` of
the same bytes without any checking, and NIXL by itself, with its progress thread, as it ships.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command, nixl_alone
from benchmarks.command import Say
from benchmarks.report import Machine, Target, at_least, below, machine, ratio, targets_table, to_json
from benchmarks.transfer_peer import BLOCK_BYTES, BLOCKS, RECEIVER, SENDER, identity, make_worker
from kv_transfer import ways
from kv_transfer.agent import TransferAgent
from kv_transfer.exchange import Event, Received, Started
from kv_transfer.handoff import Handoff
from kv_transfer.inbound import Want
from kv_transfer.kv_memory import KvMemory
from kv_transfer.transports.base import Run
from kv_transfer.transports.process_memory import read_process
from slipstream.errors import UnavailableError

_SIZES_MIB = (1, 16, 256)
_WAYS: dict[str, dict[str, Any]] = {
    "shm/direct": {"transport": "shm", "mode": "direct"},
    "shm/staged": {"transport": "shm", "mode": "staged"},
    "ucx": {"transport": "ucx"},
    "nixl": {"transport": "nixl"},
}
_TIMEOUT_S = 900.0
_EVENT_S = 30.0
_ANNOUNCE_S = 0.02  # for the announcement to arrive: what is measured begins after it

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured: `rounds` of every size, `latency_rounds` of one block, `idle_s` without work."""

    rounds: int
    latency_rounds: int
    idle_s: float
    sizes_mib: tuple[int, ...] = _SIZES_MIB


@dataclass(frozen=True, slots=True)
class OfSize:
    """Handoffs of one size: medians, and the CPU time of both processes together."""

    mib: int
    gb_per_s: float
    ms: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True)
class OfWay:
    """One transport. `way` is what was really picked; `idle_cores` of both processes together, linked, without work."""

    name: str
    way: str
    sizes: list[OfSize]
    one_block_us: float | None
    idle_cores: float | None


@dataclass(frozen=True, slots=True)
class Report:
    settings: Settings
    machine: Machine
    ways: list[OfWay]
    baselines: list[OfWay]
    skipped: dict[str, str]
    targets: list[Target]


@app.command()
def main(
    as_json: bool = typer.Option(False, "--json", help="print everything as JSON"),
    rounds: int = typer.Option(7, min=1, help="handoffs of each size and transport; the median counts"),
    idle_s: float = typer.Option(10.0, min=1, help="seconds of idling in which CPU time is counted"),
    only: str = typer.Option("", help="one transport by name, in this process"),
) -> None:
    """Measure the transports beside raw copies and beside NIXL alone."""
    settings, facts = Settings(rounds, 50, idle_s), machine()
    if only:
        sys.stdout.write(to_json(_one(only, settings)) + "\n")
        return
    result = command.run(lambda logs, say: _all(settings, facts, say), _TIMEOUT_S)
    command.show(result, as_json, _print)


async def _all(settings: Settings, facts: Machine, say: Say) -> Report:
    return await asyncio.to_thread(_measure, settings, facts, say)


def _measure(settings: Settings, facts: Machine, say: Say) -> Report:
    skipped: dict[str, str] = {}
    seen: list[OfWay] = []
    baselines: list[OfWay] = []
    for name in _WAYS:
        if name.partition("/")[0] not in ways.installed():
            skipped[name] = "not installed"
            continue
        say(name)
        measured, beside = _in_a_process(name, settings)
        seen.append(measured)
        baselines += beside
    if "nixl" in ways.installed():
        say("NIXL alone")
        try:
            baselines.append(_nixl_alone(settings))
        except UnavailableError as error:
            skipped["NIXL alone"] = str(error)
    return Report(settings, facts, seen, baselines, skipped, _targets(seen, baselines, settings))


def _one(name: str, settings: Settings) -> tuple[OfWay, list[OfWay]]:
    with _pair(_WAYS[name]) as pair:
        return pair.measure(name, settings, ("memcpy", "process_vm_readv") if name == "shm/direct" else ())


def _in_a_process(name: str, settings: Settings) -> tuple[OfWay, list[OfWay]]:
    """Each transport in a process of its own: ucxx and NIXL do not share one."""
    argv = [sys.executable, "-m", "benchmarks.transfer", "--only", name]
    argv += ["--rounds", str(settings.rounds), "--idle-s", str(settings.idle_s)]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{name} took longer than {_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise UnavailableError(f"{name}: {done.stderr.decode(errors='replace')[-400:]}")
    return msgspec.json.decode(done.stdout, type=tuple[OfWay, list[OfWay]])


class _Pair:
    """A sender in a child process, and a receiver here."""

    def __init__(self, child: subprocess.Popen[str], agent: TransferAgent, memory: KvMemory) -> None:
        self.child = child
        self.memory = memory
        self._agent = agent
        hello = self._answer()
        self._address, self._epoch = str(hello["address"]), int(hello["epoch"])
        self._processes = [psutil.Process(child.pid), psutil.Process()]
        self._way = ""
        self._number = 0
        self._there: list[Run] = []
        self._spare = (ctypes.c_ubyte * (BLOCKS * BLOCK_BYTES))()
        ctypes.memset(self._spare, 1, len(self._spare))

    def measure(self, name: str, settings: Settings, beside: tuple[str, ...]) -> tuple[OfWay, list[OfWay]]:
        """This transport, and raw copies of the same bytes in turn with it, each after the same pause."""
        sizes: dict[str, list[OfSize]] = {way: [] for way in (name, *beside)}
        for mib in settings.sizes_mib:
            self.handoff(mib)  # connects, and touches all pages
            samples: dict[str, list[tuple[float, float]]] = {way: [] for way in sizes}
            for _ in range(max(settings.rounds, min(25, settings.rounds * 64 // mib))):
                samples[name].append(self.handoff(mib))
                for way in beside:
                    time.sleep(_ANNOUNCE_S)
                    samples[way].append(self._copy(way, mib))
            for way, taken in samples.items():
                sizes[way].append(_of_size(mib, [seconds for seconds, _ in taken], sum(cpu_s for _, cpu_s in taken)))
        latencies = [self.handoff(1)[0] for _ in range(settings.latency_rounds)]
        idle_cores = self._idle(settings.idle_s)
        own = OfWay(
            name, self._way, sizes.pop(name), round(statistics.median(latencies) * 1e6, 1), round(idle_cores, 4)
        )
        return own, [OfWay(way, "no digests", of_size, None, None) for way, of_size in sizes.items()]

    def _copy(self, way: str, mib: int) -> tuple[float, float]:
        """The same bytes, copied and not looked at: here, or out of the sender's memory. Seconds, CPU-seconds."""
        if not self._there:
            self._there = [Run(*run) for run in self.ask(do="memory")["runs"]]
        here = self.memory.runs()
        length = mib * BLOCK_BYTES // len(here)
        sources = [Run(run.address, length) for run in self._there]
        targets = [Run(run.address, length) for run in here]
        began, cpu_s = time.perf_counter(), time.process_time()
        if way == "process_vm_readv":
            read_process(self.child.pid, sources, targets)
        else:
            for number, target in enumerate(targets):
                ctypes.memmove(ctypes.addressof(self._spare) + number * length, target.address, length)
        return time.perf_counter() - began, time.process_time() - cpu_s

    def handoff(self, mib: int) -> tuple[float, float]:
        """Seconds from the last computed piece to the last checked one, and CPU-seconds of both processes."""
        self._number += 1
        handoff_id, token, request_id = os.urandom(16), os.urandom(32), f"r{self._number}"
        self.ask(do="begin", id=handoff_id.hex(), token=token.hex(), blocks=mib)
        sender = identity(SENDER).public
        self._agent.open(request_id, Handoff(handoff_id, self._address, self._epoch, sender, token))
        self._wait(Started)
        self._agent.receive(request_id, Want(0, list(range(mib))))
        time.sleep(_ANNOUNCE_S)
        cpu_s = self._cpu_s()
        published_ns = self.ask(do="publish", id=handoff_id.hex(), blocks=mib)["at_ns"]
        received = self._wait(Received)
        seconds = (time.monotonic_ns() - published_ns) / 1e9
        cpu_s = self._cpu_s() - cpu_s
        assert isinstance(received, Received)
        if received.error is not None or received.tally.blocks != mib:
            raise UnavailableError(f"a handoff of {mib} MiB failed: {received.error}")
        self._way = received.tally.way
        self.ask(do="end", id=handoff_id.hex())
        return seconds, cpu_s

    def _wait(self, kind: type[Event]) -> Event:
        deadline = time.monotonic() + _EVENT_S
        while time.monotonic() < deadline:
            self._agent.news.wait(1.0)
            for event in self._agent.take_events():
                if isinstance(event, kind):
                    return event
                if isinstance(event, Received):
                    raise UnavailableError(f"the handoff failed: {event.error}")
        raise UnavailableError(f"no {kind.__name__} in {_EVENT_S:g} s")

    def _idle(self, seconds: float) -> float:
        time.sleep(0.5)
        before = self._cpu_s()
        time.sleep(seconds)
        return (self._cpu_s() - before) / seconds

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)

    def ask(self, **ask: object) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(ask) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise UnavailableError(f"the sender ended with {self.child.wait(10)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def _pair(transfer: dict[str, Any]) -> Iterator[_Pair]:
    folder = Path("/dev/shm")
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transfer_peer", str(folder), json.dumps(transfer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    board, memory, agent = make_worker(folder, transfer, seed=RECEIVER)
    try:
        yield _Pair(child, agent, memory)
    finally:
        agent.stop()
        board.unlink()
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()


def _nixl_alone(settings: Settings) -> OfWay:
    seen = nixl_alone.measure([mib << 20 for mib in settings.sizes_mib], settings.rounds, settings.idle_s)
    sizes = [_of_size(size >> 20, samples, cpu_s) for size, (samples, cpu_s) in seen.sizes.items()]
    return OfWay("NIXL alone", "WRITE, its progress threads on, no digests", sizes, None, round(seen.idle_cores, 3))


def _of_size(mib: int, samples_s: list[float], cpu_s: float) -> OfSize:
    median_s = statistics.median(samples_s)
    moved_gb = len(samples_s) * mib * 2**20 / 1e9
    return OfSize(mib, round(mib * 2**20 / median_s / 1e9, 3), round(median_s * 1e3, 3), round(cpu_s / moved_gb, 3))


def _targets(seen: list[OfWay], baselines: list[OfWay], settings: Settings) -> list[Target]:
    rates = {(way.name, size.mib): size.gb_per_s for way in (*seen, *baselines) for size in way.sizes}
    idle = {way.name: way.idle_cores for way in seen}
    targets = []
    for mib in settings.sizes_mib:
        if mib >= 16:
            value = ratio(rates.get(("shm/direct", mib)), rates.get(("process_vm_readv", mib)))
            promise = "`shm` at 0.9 of `process_vm_readv` or more from 16 MiB up"
            targets.append(at_least(f"shm/direct, {mib} MiB, of process_vm_readv", value, 0.9, promise))
    for mib in settings.sizes_mib:
        value = ratio(rates.get(("nixl", mib)), rates.get(("NIXL alone", mib)))
        targets.append(at_least(f"nixl, {mib} MiB, of NIXL alone", value, 1.0, "`nixl` at NIXL's own speed or more"))
    for name in ("ucx", "nixl"):
        cores = idle.get(name)
        promise = "an idle worker uses under 3% of a core"
        targets.append(below(f"{name}, idle cores a worker", None if cores is None else cores / 2, 0.03, promise))
    return targets


def _print(console: Console, result: Report) -> None:
    table = Table(title="Handoffs between two processes: GB/s (CPU-seconds per GB)", title_justify="left")
    for column in ("", "way", *(f"{mib} MiB" for mib in result.settings.sizes_mib), "one block", "idle, both"):
        table.add_column(column)
    for way in (*result.ways, *result.baselines):
        sizes = [f"{size.gb_per_s:.2f} ({size.cpu_s_per_gb:.2f})" for size in way.sizes]
        block = "-" if way.one_block_us is None else f"{way.one_block_us:.0f} us"
        idle = "-" if way.idle_cores is None else f"{way.idle_cores:.3f} cores"
        table.add_row(way.name, way.way, *sizes, block, idle)
    console.print(table)
    console.print(targets_table(result.targets))
    for name, reason in result.skipped.items():
        console.print(f"{name} was not measured: {reason}", style="yellow", markup=False)
    facts = result.machine
    console.print(f"{facts.cpu}, {facts.cores} cores, load {facts.load_1m}, {facts.date}")


if __name__ == "__main__":
    app()
