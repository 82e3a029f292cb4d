"""Processes that are killed, frozen or asked to end while clients stream from them."""

from __future__ import annotations

import asyncio
import signal
import time
from functools import partial
from typing import Literal

from slipstream.v1.registry_pb2 import WorkerState
from tests.faults.arena import Arena
from tests.faults.case import Case, Promise, Stream
from tests.faults.load import Load
from tests.support.fault_cluster import Kind, Member

Part = Literal["service", "engine", "both"]

KINDS: tuple[Kind, ...] = ("prefill", "decode")

# What a machine that does other things too may add to any wait.
BUSY_S = 30.0
KILLED = Promise("Every answer is whole and right; the worker is back as soon as it has loaded.", silence_s=BUSY_S)
FROZEN = Promise(
    "Every answer is whole and right: what a frozen worker had goes on with another one, within the deadlines.",
    silence_s=BUSY_S,
)


def signalled(member: Member, number: signal.Signals, part: Part) -> None:
    """To the service, the engine process, or both."""
    if not member.signal(number, service=part != "engine", engine=part != "service"):
        raise AssertionError(f"{member.name} has no process to signal")


async def busiest(arena: Arena, load: Load, kind: Kind) -> Member:
    """The worker of that kind with the most requests of the moment: a fault where nothing is would show nothing.

    Prompts are short: a prefill worker that is found idle for a while has one in the next moment.
    """
    end_s = time.monotonic() + (BUSY_S if kind == "decode" else 3.0)
    while time.monotonic() < end_s:
        await load.until_streaming()
        members = arena.cluster.of(kind)
        records = await asyncio.gather(*(member.status() for member in members))
        running = [record.load.running if record is not None else 0 for record in records]
        if max(running) > 0:
            return members[running.index(max(running))]
        await asyncio.sleep(0.01)
    if kind == "prefill":
        return arena.cluster.of(kind)[0]
    raise AssertionError(f"no {kind} worker had a request within {BUSY_S:g} s")


async def kill(arena: Arena, load: Load, *, kind: Kind, part: Part) -> None:
    """SIGKILL, and then a worker in its place: both workers of the kind, one after the other."""
    for member in arena.cluster.of(kind):
        await load.until_streaming()
        starts = member.starts
        signalled(member, signal.SIGKILL, part)
        assert member.process is not None
        await asyncio.to_thread(member.process.join, BUSY_S)
        await load.until_answered(3)  # without it
        await arena.whole()
        assert member.starts > starts
    await load.until_answered(6)


async def freeze(arena: Arena, load: Load, *, kind: Kind, part: Part, hold_s: float) -> None:
    """SIGSTOP, and SIGCONT after that time, if it is still there: a service does not wait for ever for its engine."""
    member = await busiest(arena, load, kind)
    signalled(member, signal.SIGSTOP, part)
    began_s, silent_after_s = time.monotonic(), 0.0
    try:
        while time.monotonic() - began_s < hold_s:
            record = await member.status() if part == "engine" else None
            if record is not None and record.state == WorkerState.FENCED:
                silent_after_s = silent_after_s or time.monotonic() - began_s
            await asyncio.sleep(0.1)
    finally:
        member.signal(signal.SIGCONT)
    if silent_after_s:
        load.measured.figures["called_silent_after_s"] = round(silent_after_s, 1)
    elif (part, kind) == ("engine", "decode") and hold_s > BUSY_S / 2:
        load.measured.broken.append("its service did not notice that it stood still")
    await load.until_answered(6)
    starts = member.starts
    await arena.whole()
    load.measured.figures["started_anew"] = member.starts - starts


async def restart_one_by_one(arena: Arena, load: Load) -> None:
    """SIGTERM, wait for the end, start anew, wait until it is ready; then the next."""
    longest_s = 0.0
    for member in arena.cluster.members:
        await load.until_streaming()
        began_s = time.monotonic()
        signalled(member, signal.SIGTERM, "service")
        assert member.process is not None
        await asyncio.to_thread(member.process.join, BUSY_S)
        if member.process.exitcode != 0:
            load.measured.broken.append(f"{member.name} ended with {member.process.exitcode}")
        await arena.whole()
        longest_s = max(longest_s, time.monotonic() - began_s)
        await load.until_answered(2)
    load.measured.figures["longest_restart_s"] = round(longest_s, 1)


async def lose_control_plane(arena: Arena, load: Load, *, gone_s: float) -> None:
    """Kill it, keep it away, have a worker restarted meanwhile, and bring it back."""
    plane = arena.cluster.plane
    assert plane is not None
    plane.kill()
    await asyncio.to_thread(plane.join, BUSY_S)
    newcomer = arena.cluster.of("decode")[1]
    signalled(newcomer, signal.SIGTERM, "service")
    assert newcomer.process is not None
    await asyncio.to_thread(newcomer.process.join, BUSY_S)
    newcomer.start()
    began_s = time.monotonic()
    answered = load.measured.answered
    while time.monotonic() - began_s < gone_s:
        await load.until_answered(1)
        await asyncio.sleep(min(1.0, gone_s / 20))
    load.measured.figures["answered_without_it"] = load.measured.answered - answered
    back_s = time.monotonic()
    arena.cluster.start_plane()
    await arena.whole()
    load.measured.figures["whole_after_s"] = round(time.monotonic() - back_s, 1)
    await load.until_answered(6)


def _kills() -> list[Case]:
    rows = []
    parts: tuple[tuple[Part, str], ...] = (("service", "the service"), ("engine", "the engine process"))
    for kind in KINDS:
        for part, words in parts:
            rows.append(
                Case(
                    f"kill-{kind}-{part}",
                    "kill -9",
                    f"{words} of each {kind} worker in turn, in the middle of answers",
                    KILLED,
                    inflict=partial(kill, kind=kind, part=part),
                    short=(kind, part) == ("decode", "service"),
                )
            )
    return rows


def _freezes() -> list[Case]:
    rows = []
    parts: tuple[tuple[Part, str], ...] = (("both", "service and engine"), ("engine", "the engine alone"))
    for kind in KINDS:
        for part, words in parts:
            for name, hold_s in (("short", 0.5), ("long", 25.0)):
                rows.append(
                    Case(
                        f"stop-{kind}-{part}-{name}",
                        "SIGSTOP, SIGCONT",
                        f"{words} of a {kind} worker for {hold_s:g} s",
                        FROZEN,
                        inflict=partial(freeze, kind=kind, part=part, hold_s=hold_s),
                    )
                )
    return rows


PLANE_LOST = Promise(
    "Nobody notices; a worker that starts meanwhile is used as soon as the control plane is back.", silence_s=BUSY_S
)

CASES = (
    *_kills(),
    *_freezes(),
    *(
        Case(
            f"control-plane-gone-{name}",
            "Control plane",
            f"killed, and gone for {words}; a decode worker is started anew meanwhile",
            PLANE_LOST,
            inflict=partial(lose_control_plane, gone_s=gone_s),
            stream=Stream(at_once=2),
            short=name == "short",
        )
        for name, words, gone_s in (("short", "6 s (two leases)", 6.0), ("long", "ten minutes", 600.0))
    ),
    Case(
        "rolling-restart",
        "Rolling restart",
        "every worker in turn: SIGTERM, its end, a new one, ready",
        Promise("No request fails, and none waits for a worker.", silence_s=BUSY_S),
        inflict=restart_one_by_one,
    ),
)
