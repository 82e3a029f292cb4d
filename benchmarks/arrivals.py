"""The open load: requests come at times drawn beforehand, whether or not those before them are answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.load import Answer, LoadClient, Question
from benchmarks.prompts import Prompts
from benchmarks.server import CpuMeter, CpuUse, Server
from slipstream.errors import SlipstreamError


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one kind.

    Attributes:
        rate_per_s: they come with, on average.
        max_tokens: of each answer, which has exactly as many.
        busy: it asks for more tokens a second than some systems can give. At other loads every system that keeps up
            has the same tokens a second, those that are asked for.
    """

    name: str
    prompt_tokens: int
    rate_per_s: float
    requests: int
    max_tokens: int
    busy: bool


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes, in seconds from the start of the load, and its prompt."""

    at_s: float
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Driven:
    """What came of one load.

    Attributes:
        answers: in the order of their arrival; None for a request that failed.
        failures: what was said of those.
        late_s: the longest that a request was sent after its time: above some milliseconds, the client was too slow.
    """

    answers: tuple[Answer | None, ...]
    failures: tuple[str, ...]
    late_s: float
    cpu: CpuUse


def draw(load: Load, words: Sequence[int], seed: int) -> list[Arrival]:
    """The same arrivals for the same seed: a Poisson process that begins with its first request."""
    times, prompts = random.Random(seed), Prompts(words, seed)
    arrivals, at_s = [], 0.0
    for _ in range(load.requests):
        arrivals.append(Arrival(at_s, prompts.draw(load.prompt_tokens)))
        at_s += times.expovariate(load.rate_per_s)
    return arrivals


async def drive(server: Server, client: LoadClient, arrivals: Sequence[Arrival], max_tokens: int) -> Driven:
    """Send each request at its time and read all answers to their end."""
    answers: list[Answer | None] = [None] * len(arrivals)
    failures: list[str] = []
    late_s = 0.0

    async def one(place: int, arrival: Arrival) -> None:
        nonlocal late_s
        await asyncio.sleep(began_s + arrival.at_s - time.monotonic())
        late_s = max(late_s, time.monotonic() - began_s - arrival.at_s)
        try:
            answers[place] = await client.ask(Question(arrival.token_ids, max_tokens, server.has_account))
        except SlipstreamError as error:
            failures.append(str(error))

    meter, began_s = CpuMeter(server), time.monotonic()
    async with asyncio.TaskGroup() as group:
        for place, arrival in enumerate(arrivals):
            group.create_task(one(place, arrival))
    return Driven(tuple(answers), tuple(failures), late_s, meter.read())
