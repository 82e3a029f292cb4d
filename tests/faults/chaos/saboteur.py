"""Does what the plan says to the cluster's processes, one thing at a time to each group, and waits until it is whole.

That is what bounds the faults: of prefill workers, decode workers and frontends at most one each is in trouble at a
time, and the next one is not touched before it is back and known again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from typing import Literal

import psutil

from slipstream.v1.registry_pb2 import Role
from tests.faults import fuzz_faults
from tests.faults.chaos.checker import Checker
from tests.faults.chaos.plan import LOADS, Group, Kind, Plan, PlannedFault, Round
from tests.faults.chaos.promises import Disturbance
from tests.faults.chaos.seats import Cluster, Seat

READY_S = {"simulated": 120.0, "vllm": 240.0}
"""Longest until what was broken is back; a busy machine starts a process in some seconds."""
_LOAD_S = 15.0
_BOTH = (Group.PREFILL, Group.DECODE)


class Saboteur:
    """Args:
    isolated: whether the cluster has a network of its own, in which packets may be dropped.
    """

    def __init__(self, cluster: Cluster, checker: Checker, plan: Plan, *, isolated: bool) -> None:
        self._cluster = cluster
        self._checker = checker
        self._plan = plan
        self._isolated = isolated
        self._locks = {group: asyncio.Lock() for group in Group}
        self.done: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.slowest_recovery_s: dict[str, float] = {}

    async def run(self, one: Round, began_s: float) -> None:
        """All faults of a round."""
        async with asyncio.TaskGroup() as group:
            for fault in one.faults:
                group.create_task(self._run(fault, began_s, began_s + one.load_s), name=fault.title)

    async def _run(self, fault: PlannedFault, began_s: float, end_s: float) -> None:
        await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
        if fault.kind in LOADS:  # the requests are the fault
            now_s = time.monotonic()
            self._note(Disturbance(fault.title, fault.kind, fault.group, -1, now_s, now_s + _LOAD_S), fault)
            return
        groups = _BOTH if fault.kind in (Kind.FLIP_ROLE, Kind.ROLLING) else (fault.group,)
        async with AsyncExitStack() as held:
            for group in groups:
                await held.enter_async_context(self._locks[group])
            seat = self._cluster.of(fault.group)[fault.index]
            if time.monotonic() > end_s or not await self._may(fault, seat):
                self.skipped[str(fault.kind)] += 1
                return
            await self._disturb(fault, seat)

    async def _may(self, fault: PlannedFault, seat: Seat) -> bool:
        if fault.kind is Kind.BLACKHOLE and not self._isolated:
            return False
        if fault.kind is Kind.KILL_MEMBER and seat.settings.frontend.workers < 2:
            return False
        return seat.process is not None

    async def _disturb(self, fault: PlannedFault, seat: Seat) -> None:
        disturbance = Disturbance(fault.title, fault.kind, fault.group, fault.index, time.monotonic())
        self._note(disturbance, fault)
        await self._inflict(fault, seat)
        healed_s = time.monotonic()
        groups = _BOTH if fault.kind in (Kind.FLIP_ROLE, Kind.ROLLING) else (fault.group,)
        limit_s = READY_S[self._plan.shape.engine]
        late = await self._cluster.until_ready(self._cluster.of(*groups), limit_s)
        disturbance.ended_s = time.monotonic()
        took_s = disturbance.ended_s - healed_s
        name = str(fault.kind)
        self.slowest_recovery_s[name] = max(self.slowest_recovery_s.get(name, 0.0), round(took_s, 2))
        self._checker.check(
            "what was broken comes back", not late, f"{late} not ready {limit_s:g} s after {fault.title}"
        )

    def _note(self, disturbance: Disturbance, fault: PlannedFault) -> None:
        self._checker.disturbances.append(disturbance)
        where = "" if fault.kind in LOADS else f" {fault.group}"
        self.done[f"{fault.kind}{where}"] += 1

    async def _inflict(self, fault: PlannedFault, seat: Seat) -> None:
        """Returns when it is over, and what was stopped runs again; what was ended need not be back."""
        rng = random.Random(f"{self._plan.seed}:{fault.number}")
        match fault.kind:
            case Kind.KILL | Kind.DRAIN:
                await self._end(seat, fault.kind)
            case Kind.KILL_ENGINE:
                engine = seat.engine_pid()
                if engine is not None:
                    seat.ending = fault.kind
                    os.kill(engine, signal.SIGKILL)
                    await self._until_next(seat, seat.starts)
            case Kind.KILL_MEMBER:
                _kill_member(seat, rng)
            case Kind.STOP_SHORT | Kind.STOP_LONG:
                await _stop(seat, fault.hold_s)
            case Kind.ROLLING:
                for worker in self._cluster.workers:
                    if self._plan.spared.get(worker.group) != worker.index:
                        await self._end(worker, fault.kind)
                        await self._cluster.until_ready([worker], READY_S[self._plan.shape.engine])
            case Kind.FLIP_ROLE:
                await _flip_role(seat, fault.hold_s)
            case Kind.CUT_TRANSFERS:
                agents = {worker.settings.transfer.port for worker in self._cluster.workers}
                _cut(seat.engine_pid() or seat.pid, agents)
            case Kind.CUT_CALLS:
                _cut(seat.pid, {seat.settings.worker.port})
            case Kind.CUT_CLIENTS:
                for pid in seat.tree():
                    _cut(pid, {seat.settings.frontend.http_port, seat.settings.frontend.grpc_port})
            case Kind.GARBAGE:
                await fuzz_faults.send_garbage(seat.settings.transfer.port, rng)
            case Kind.FLIP_BITS:
                await fuzz_faults.flip_bits(seat.record, fault.hold_s, rng)
            case Kind.BLACKHOLE:
                await _blackhole(seat, fault.hold_s)

    async def _end(self, seat: Seat, kind: Kind) -> None:
        starts = seat.starts
        number = signal.SIGKILL if kind is Kind.KILL else signal.SIGTERM
        seat.send(number, why=kind, engine=False)
        await self._until_next(seat, starts)

    async def _until_next(self, seat: Seat, starts: int) -> None:
        """Until a new process sits there."""
        limit_s = 60.0
        end_s = time.monotonic() + limit_s
        while seat.starts == starts and time.monotonic() < end_s:  # noqa: ASYNC110 - another process: no event
            await asyncio.sleep(0.05)
        self._checker.check(
            "what is told to end does",
            seat.starts > starts,
            f"{seat.name} still runs {limit_s:g} s after its {seat.ending}",
        )


def _kill_member(seat: Seat, rng: random.Random) -> None:
    with suppress(psutil.Error, IndexError):
        children = psutil.Process(seat.pid).children()
        members = [child for child in children if "frontend.pool_member" in " ".join(child.cmdline())]
        rng.choice(members).kill()


async def _stop(seat: Seat, hold_s: float) -> None:
    starts = seat.starts
    seat.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(hold_s)
    finally:
        if seat.starts == starts:
            seat.send(signal.SIGCONT)


async def _flip_role(seat: Seat, hold_s: float) -> None:
    own, other = Role.ROLE_PREFILL, Role.ROLE_DECODE
    if seat.group is Group.DECODE:
        own, other = other, own
    await seat.set_role(other)
    try:
        await asyncio.sleep(hold_s)
    finally:
        for _ in range(5):
            if await seat.set_role(own):
                break
            await asyncio.sleep(0.5)


def _cut(pid: int | None, ports: set[int]) -> None:
    if pid is not None:
        fuzz_faults.cut(pid, ports)


async def _blackhole(seat: Seat, hold_s: float) -> None:
    """Packets of its ports vanish, in both directions, without a word to either end."""
    try:
        await asyncio.to_thread(_drop_packets, seat, "-I")
        await asyncio.sleep(hold_s)
    finally:
        await asyncio.to_thread(_drop_packets, seat, "-D")


def _drop_packets(seat: Seat, change: Literal["-I", "-D"]) -> None:
    for port in (seat.settings.worker.port, seat.settings.transfer.port):
        for flag in ("--dport", "--sport"):
            rule = ["INPUT", "-p", "tcp", flag, str(port), "-j", "DROP"]
            subprocess.run(["iptables", "-w", change, *rule], check=True, timeout=10.0)
