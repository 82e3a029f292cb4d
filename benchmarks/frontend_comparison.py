"""What is asked of each frontend, in which order, and what is made of what was seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from statistics import median

from benchmarks.frontend_servers import MODEL_NAME, MeasuredFrontend
from benchmarks.report import Machine, Target, at_least, at_most, ratio
from benchmarks.samples import percentile
from benchmarks.stream_load import Streamed, chat_request, closed_load
from slipstream.errors import UnavailableError

CPU_TARGET = "0.8 of Dynamo's CPU per request or less"
RATE_TARGET = "at least its req/s"
_LOAD_TIMEOUT_S = 240.0
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of each system in each round.

    Attributes:
        requests: of the load, over `connections` connections, with prompts of `load_words` words.
        latency_requests: for each of `latency_words`, one after another over one connection.
        rounds: each starts each system anew, in turn.
    """

    requests: int = 2000
    connections: int = 256
    warm_requests: int = 300
    load_words: int = 200
    latency_words: tuple[int, ...] = (200, 2000)
    latency_requests: int = 100
    max_tokens: int = 64
    rounds: int = 3
    seed: int = 4


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load on one frontend.

    Attributes:
        cpu_ms_per_request: of all frontend processes.
        events_per_request: server-sent events; tokens that came together may share one.
    """

    requests: int
    errors: int
    requests_per_s: float
    cpu_ms_per_request: float
    tokens_per_request: float
    events_per_request: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    total_p50_ms: float
    total_p99_ms: float


@dataclass(frozen=True, slots=True)
class Round:
    """One start of one system.

    Attributes:
        added: by words of the prompt, of requests that came one by one. The workers take no time: all of it is the
            frontend's.
    """

    system: str
    load: Loaded
    added: dict[str, Loaded]


@dataclass(frozen=True, slots=True)
class SystemResult:
    """The medians of the rounds."""

    system: str
    cpu_ms_per_request: float
    requests_per_s: float
    events_per_request: float
    added_p50_ms: dict[str, float]
    added_p99_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    plan: Plan
    machine: Machine
    skipped: str | None
    systems: list[SystemResult]
    rounds: list[Round]
    targets: list[Target]


class Words:
    """Draws prompts of words; no two share a beginning."""

    def __init__(self, words: Sequence[str], seed: int) -> None:
        self._words = words
        self._random = random.Random(seed)

    def requests(self, count: int, words: int, max_tokens: int) -> list[bytes]:
        return [
            chat_request(_HOST, MODEL_NAME, " ".join(self._random.choices(self._words, k=words)), max_tokens)
            for _ in range(count)
        ]


async def measure(starting: AbstractAsyncContextManager[MeasuredFrontend], plan: Plan, words: Words) -> Round:
    """Start a system, ask it everything, stop it.

    Raises:
        StartupError: it did not become ready.
        UnavailableError: an answer failed or was short.
        DeadlineError: the load did not end.
    """
    async with starting as frontend:
        await load_of(frontend, plan, words.requests(plan.warm_requests, plan.load_words, plan.max_tokens))
        load = await load_of(frontend, plan, words.requests(plan.requests, plan.load_words, plan.max_tokens))
        added = {}
        for length in plan.latency_words:
            requests = words.requests(plan.latency_requests, length, plan.max_tokens)
            added[str(length)] = await load_of(frontend, plan, requests, connections=1)
        return Round(frontend.name, load, added)


async def load_of(
    frontend: MeasuredFrontend, plan: Plan, requests: list[bytes], connections: int | None = None
) -> Loaded:
    """Send all of these over `plan.connections` connections, if no other number is said.

    Raises:
        UnavailableError: an answer failed or was short.
        DeadlineError: the load did not end.
    """
    before_s = frontend.cpu_s()
    seen = await closed_load(
        _HOST, frontend.port, requests, connections=connections or plan.connections, timeout_s=_LOAD_TIMEOUT_S
    )
    return loaded(seen, frontend.cpu_s() - before_s, plan.max_tokens)


def loaded(seen: Streamed, cpu_s: float, max_tokens: int) -> Loaded:
    """The figures of a load.

    Raises:
        UnavailableError: an answer failed, or had not as many tokens as were asked for.
    """
    answers = len(seen.total_s)
    if seen.errors:
        raise UnavailableError(f"{len(seen.errors)} of {answers + len(seen.errors)} answers failed: {seen.errors[0]}")
    if seen.tokens != answers * max_tokens:
        raise UnavailableError(f"{answers} answers of {max_tokens} tokens came to {seen.tokens} tokens")
    return Loaded(
        requests=answers,
        errors=len(seen.errors),
        requests_per_s=seen.requests_per_s,
        cpu_ms_per_request=cpu_s / answers * 1000,
        tokens_per_request=seen.tokens / answers,
        events_per_request=seen.events / answers,
        ttft_p50_ms=percentile(seen.ttft_s, 50) * 1000,
        ttft_p99_ms=percentile(seen.ttft_s, 99) * 1000,
        total_p50_ms=percentile(seen.total_s, 50) * 1000,
        total_p99_ms=percentile(seen.total_s, 99) * 1000,
    )


def report(plan: Plan, machine: Machine, rounds: list[Round], skipped: str | None) -> Report:
    """Medians, and whether the targets are met; without Dynamo none is."""
    names = list(dict.fromkeys(one.system for one in rounds))
    systems = {name: _medians(name, [one for one in rounds if one.system == name]) for name in names}
    ours, theirs = systems["slipstream"], systems.get("dynamo")
    cpu = ratio(ours.cpu_ms_per_request, theirs.cpu_ms_per_request) if theirs else None
    rate = ratio(ours.requests_per_s, theirs.requests_per_s) if theirs else None
    targets = [
        at_most("frontend CPU per request / Dynamo's", cpu, 0.8, CPU_TARGET),
        at_least(f"requests/s at {plan.connections} connections / Dynamo's", rate, 1.0, RATE_TARGET),
    ]
    return Report(plan, machine, skipped, list(systems.values()), rounds, targets)


def _medians(name: str, rounds: list[Round]) -> SystemResult:
    lengths = list(rounds[0].added)
    return SystemResult(
        system=name,
        cpu_ms_per_request=median(one.load.cpu_ms_per_request for one in rounds),
        requests_per_s=median(one.load.requests_per_s for one in rounds),
        events_per_request=median(one.load.events_per_request for one in rounds),
        added_p50_ms={length: median(one.added[length].ttft_p50_ms for one in rounds) for length in lengths},
        added_p99_ms={length: median(one.added[length].ttft_p99_ms for one in rounds) for length in lengths},
    )
