"""Many streams through one frontend for a long time: errors, memory, and what is left behind by clients that leave."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import httpx
import psutil

from benchmarks.frontend_servers import MODEL_NAME, MeasuredFrontend
from benchmarks.report import Target, at_least, at_most, equals
from benchmarks.stream_load import chat_request, closed_load
from slipstream.errors import DeadlineError

_HOST = "127.0.0.1"
_SAMPLE_EVERY_S = 2.0
# For the last answers to end, and for the workers to have heard of the last client that left.
_END_TIMEOUT_S = 60.0
_LEAVE_WITHIN_S = 10.0
_CONNECT_TIMEOUT_S = 60.0
_REFUSAL_BYTES = 1000
_OPEN = re.compile(r"^slipstream_frontend_(requests_in_flight\{.*chat.*\}|dispatched_requests) (\S+)$", re.MULTILINE)
_STREAMS_TARGET = (
    "2,000 concurrent streams through one frontend with no error, flat memory over 10 minutes, and clean aborts"
)
FLAT = 1.05
"""Memory is flat when its median in the last fifth is at most this much of that in the second fifth."""


@dataclass(frozen=True, slots=True)
class Endurance:
    """What is asked.

    Attributes:
        ramp_s: over which the streams begin.
        leavers: of the streams, those whose clients leave in the middle of each answer.
        tokens: of each answer; the workers make one each `step_s`.
    """

    streams: int
    seconds: float
    step_s: float = 1.0
    tokens: int = 60
    ramp_s: float = 40.0
    leavers: int = 100
    words: int = 50
    seed: int = 5


@dataclass(slots=True)
class Endured:
    """What was seen. Memory is the frontend's resident set, all processes together.

    Attributes:
        left: answers whose client went away in the middle.
        open_after: requests that the frontend still thought open when everybody had gone.
    """

    answers: int = 0
    tokens: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)
    open_after: float = -1.0
    cpu_cores: float = 0.0
    most_streams: int = 0
    memory_mib: list[float] = field(default_factory=list)

    @property
    def memory_growth(self) -> float:
        """Median memory of the last fifth over that of the second fifth, by which everything is warm."""
        fifth = max(1, len(self.memory_mib) // 5)
        return median(self.memory_mib[-fifth:]) / median(self.memory_mib[fifth : 2 * fifth] or self.memory_mib)


def targets(plan: Endurance, seen: Endured) -> list[Target]:
    return [
        at_least("concurrent streams", seen.most_streams, plan.streams, _STREAMS_TARGET),
        equals("errors", len(seen.errors), 0, _STREAMS_TARGET),
        at_most(f"memory growth over {plan.seconds:g} s", seen.memory_growth, FLAT, _STREAMS_TARGET),
        equals("requests open after all clients had gone", seen.open_after, 0, _STREAMS_TARGET),
    ]


async def endure(frontend: MeasuredFrontend, plan: Endurance) -> Endured:
    """Keep `plan.streams` streams going for `plan.seconds`.

    Raises:
        DeadlineError: the last answers did not end.
        UnavailableError: no connection can be made.
    """
    seen, until_s = Endured(), time.monotonic() + plan.seconds
    process = psutil.Process(frontend.pid)
    cpu_s = sum(process.cpu_times()[:2])
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        staying = tasks.create_task(_stay(frontend, plan, until_s), name="staying")
        leaving = [tasks.create_task(_leave(frontend, plan, seen, until_s, i)) for i in range(plan.leavers)]
        sampling = tasks.create_task(_sample(frontend, process, seen), name="sampling")
        await asyncio.wait([staying, *leaving])
        sampling.cancel()
    answered = staying.result()
    seen.answers, seen.tokens = answered.answers, answered.tokens
    seen.errors += answered.errors
    seen.cpu_cores = (sum(process.cpu_times()[:2]) - cpu_s) / (time.monotonic() - began_s)
    seen.open_after = await _open_after(frontend)
    return seen


async def _stay(frontend: MeasuredFrontend, plan: Endurance, until_s: float) -> Endured:
    connections = plan.streams - plan.leavers
    answered = await closed_load(
        _HOST,
        frontend.port,
        _requests(plan, until_s),
        connections=connections,
        ramp_s=plan.ramp_s,
        timeout_s=plan.seconds + plan.tokens * plan.step_s + _END_TIMEOUT_S,
    )
    return Endured(answers=len(answered.total_s), tokens=answered.tokens, errors=answered.errors)


def _requests(plan: Endurance, until_s: float) -> Iterator[bytes]:
    """Requests without end, until it is time."""
    draw = random.Random(plan.seed)
    for number in itertools.count():
        if time.monotonic() >= until_s:
            return
        # Answers of different lengths: otherwise all of them would begin and end together for ever.
        tokens = draw.randint(plan.tokens // 2, plan.tokens)
        yield chat_request(_HOST, MODEL_NAME, f"{number} " + "word " * plan.words, tokens)


async def _leave(frontend: MeasuredFrontend, plan: Endurance, seen: Endured, until_s: float, seed: int) -> None:
    """One client after another that goes away in the middle of its answer."""
    draw = random.Random(seed)
    while time.monotonic() < until_s:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(_HOST, frontend.port)
            writer.write(chat_request(_HOST, MODEL_NAME, f"{seed} {draw.random()}", plan.tokens * 1000))
            status = await reader.readline()
            refused = not status.startswith(b"HTTP/1.1 200")
            rest = await (reader.read(_REFUSAL_BYTES) if refused else reader.readuntil(b'"content":'))
        if refused:
            seen.errors.append((status + rest).decode(errors="replace"))
        await asyncio.sleep(draw.uniform(0, min(_LEAVE_WITHIN_S, plan.tokens * plan.step_s)))
        writer.transport.abort()
        seen.left += 1


async def _sample(frontend: MeasuredFrontend, process: psutil.Process, seen: Endured) -> None:
    while True:
        await asyncio.sleep(_SAMPLE_EVERY_S)
        family = [process, *process.children(recursive=True)]
        seen.memory_mib.append(round(sum(one.memory_info().rss for one in family) / 2**20, 2))
        seen.most_streams = max(seen.most_streams, int((await _open(frontend))[0]))


async def _open_after(frontend: MeasuredFrontend) -> float:
    """Requests that the frontend counts as open, once that is 0 or it is too late."""
    deadline_s = time.monotonic() + _LEAVE_WITHIN_S
    while (still := max(await _open(frontend))) and time.monotonic() < deadline_s:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.1)
    return still


async def _open(frontend: MeasuredFrontend) -> list[float]:
    """In flight at the face, and with the workers."""
    async with httpx.AsyncClient(timeout=_CONNECT_TIMEOUT_S, trust_env=False) as http:
        page = (await http.get(f"http://{_HOST}:{frontend.port}/metrics")).text
    found = {name.partition("{")[0]: float(value) for name, value in _OPEN.findall(page)}
    if not found:
        raise DeadlineError("the frontend's /metrics says nothing of open requests")
    return [found.get("requests_in_flight", 0.0), found.get("dispatched_requests", 0.0)]
