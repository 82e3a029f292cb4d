"""A frontend process that is killed with many streams open, and one that is frozen."""

from __future__ import annotations

import asyncio
import signal
import time
from functools import partial
from typing import Any

import psutil

from slipstream.errors import SlipstreamError
from tests.faults.arena import ANSWER_TOKENS, FRONTEND_PROCESSES, Arena
from tests.faults.case import Case, Measured, Promise, Stream
from tests.faults.load import HANG_S, Load, OwnConnection
from tests.faults.process_cases import BUSY_S

CLIENTS = 20
NEW_WITHIN_S = 60.0


async def kill_one(arena: Arena, *, streams: int) -> Measured:
    """Open the streams, kill one of the processes when many have tokens, and wait for all of them.

    The streams of the process that lives must all be answered, those of the other one must end with an error at once.
    """
    await arena.whole()
    load = Load([arena.target] * CLIENTS, arena.pool, Stream(at_once=streams, tokens=ANSWER_TOKENS), seed=11)
    tasks = [asyncio.create_task(load.ask(n)) for n in range(streams)]
    try:
        await load.until_streaming(4)
        processes = arena.frontend_processes()
        held = [_connections(process.pid, arena) for process in processes]
        victim = held.index(max(held))
        load.measured.figures["streams_open"] = len(load.open)
        load.measured.figures["clients_of_the_killed"] = held[victim]
        processes[victim].send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        answered = load.measured.answered
        load.measured.figures["new_one_serves_after_s"] = round(await _until_both(arena, killed_s), 1)
        await asyncio.wait(tasks, timeout=HANG_S + BUSY_S)
        load.measured.figures["answered_after_it"] = load.measured.answered - answered
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await load.close()
    # What the process that lives had is none of the other one's business.
    most = streams * held[victim] // max(1, sum(held))
    if load.measured.lost > most:
        load.measured.broken.append(f"{load.measured.lost} lost, the killed process had {most} streams at most")
    return load.measured


async def _until_both(arena: Arena, since_s: float) -> float:
    """Until as many processes as before serve; how long that was."""
    while time.monotonic() - since_s < NEW_WITHIN_S:
        if len(arena.frontend_processes()) == FRONTEND_PROCESSES and await _all_answer(arena):
            return time.monotonic() - since_s
        await asyncio.sleep(0.1)
    raise AssertionError(f"no new frontend process within {NEW_WITHIN_S:g} s")


async def _all_answer(arena: Arena) -> bool:
    async def one() -> bool:
        async with OwnConnection(arena.target, timeout_s=5.0) as client:
            try:
                return bool(await client.models())
            except SlipstreamError:
                return False

    listening = all(_listens(process.pid, arena) for process in arena.frontend_processes())
    return listening and all(await asyncio.gather(*(one() for _ in range(4))))


def _listens(pid: int, arena: Arena) -> bool:
    return any(one.status == "LISTEN" for one in _sockets(pid, arena))


def _connections(pid: int, arena: Arena) -> int:
    return sum(one.status == "ESTABLISHED" for one in _sockets(pid, arena))


def _sockets(pid: int, arena: Arena) -> list[Any]:
    port = arena.frontend_settings.frontend.grpc_port
    try:
        found = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return []
    return [one for one in found if one.laddr and one.laddr.port == port]


CASES = tuple(
    Case(
        f"frontend-killed-{streams}",
        "Frontend",
        f"kill -9 of one of two processes, with {streams} streams open",
        Promise(
            "The streams of that process end with an error at once, those of the other one go on; workers let go of "
            "all of them, and a new process serves within seconds.",
            silence_s=3 * BUSY_S,
            lost=streams * 3 // 4,
        ),
        alone=partial(kill_one, streams=streams),
        short=streams < 100,
    )
    for streams in (40, 200)
)
