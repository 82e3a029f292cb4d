"""The two loads. Both are closed: what comes next waits for what was before, so both servers get the same order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.load import Answer, LoadClient, Question
from benchmarks.prompts import Prompts
from benchmarks.samples import Window, split_gaps
from benchmarks.server import CpuMeter, CpuUse, Server
from slipstream.errors import DeadlineError

_IDLE_S = 2.0
_SETTLE_S = 0.5
_STREAMS_BEGIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class InterferencePlan:
    """Streams that decode steadily, and long prompts that come meanwhile, one after the other.

    Attributes:
        streams: decoding at the same time.
        steady_tokens: a stream has sent this many before the first long prompt comes.
        prompts: long ones a round; a round begins with new streams and ends with hanging up on them.
        pause_s: between two long prompts.
        rounds: at least this many...
        samples: ...and more until there are this many inter-token latencies under a long prompt...
        limit_s: ...but no new one after this long.
    """

    streams: int = 4
    stream_prompt_tokens: int = 100
    stream_tokens: int = 4000
    steady_tokens: int = 8
    long_prompt_tokens: int = 2000
    prompts: int = 3
    pause_s: float = 0.5
    rounds: int = 3
    samples: int = 200
    limit_s: float = 80.0


@dataclass(slots=True)
class Interference:
    """What the interference phase saw.

    Attributes:
        disturbed_s: inter-token latencies of the streams of which any part lay under a long prompt's prefill.
        quiet_s: the others, once all streams were decoding.
        windows: from sending each long prompt to its first token.
        arrivals, reads: of all streams; see `Answer`.
    """

    disturbed_s: list[float] = field(default_factory=list)
    quiet_s: list[float] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    long_answers: list[Answer] = field(default_factory=list)
    rounds: int = 0
    arrivals: int = 0
    reads: int = 0
    cpu: CpuUse = field(default_factory=lambda: CpuUse(0.0, 0.0, 0.0, 0.0))


@dataclass(frozen=True, slots=True)
class Sequential:
    """What the phase of one request after another saw."""

    answers: tuple[Answer, ...]
    cpu: CpuUse


async def warm_up(client: LoadClient, prompts: Prompts, lengths: Sequence[int], streams: int) -> None:
    """What a server does only once is done before anything is measured."""
    for tokens in sorted(lengths):
        await client.ask(Question(prompts.draw(tokens), max_tokens=8))
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(client.ask(Question(prompts.draw(min(lengths)), max_tokens=8)))


async def idle_cores(server: Server) -> float:
    """CPU seconds a second that the server takes with nothing to do."""
    meter = CpuMeter(server)
    await asyncio.sleep(_IDLE_S)
    used = meter.read()
    return used.server_s / used.wall_s


async def one_after_another(
    server: Server, client: LoadClient, prompts: Sequence[Sequence[int]], max_tokens: int
) -> Sequential:
    """Ask all prompts, each when the answer before it is whole."""
    meter = CpuMeter(server)
    answers = [await client.ask(Question(ids, max_tokens, server.has_account)) for ids in prompts]
    return Sequential(tuple(answers), meter.read())


async def interference(
    server: Server,
    client: LoadClient,
    prompts: Prompts,
    plan: InterferencePlan,
    progress: Callable[[Interference], None],
) -> Interference:
    """Rounds of long prompts beside steady streams, until there are enough samples.

    Args:
        progress: called after each round.

    Raises:
        UnavailableError, DeadlineError: a request failed.
    """
    seen = Interference()
    began_s, meter = time.monotonic(), CpuMeter(server)
    while seen.rounds < plan.rounds or len(seen.disturbed_s) < plan.samples:
        if seen.rounds and time.monotonic() - began_s > plan.limit_s:
            break
        await _round(server, client, prompts, plan, seen)
        seen.rounds += 1
        progress(seen)
    seen.cpu = meter.read()
    return seen


async def _round(
    server: Server, client: LoadClient, prompts: Prompts, plan: InterferencePlan, seen: Interference
) -> None:
    streams = [Answer(prompt_tokens=plan.stream_prompt_tokens) for _ in range(plan.streams)]
    questions = [Question(prompts.draw(plan.stream_prompt_tokens), plan.stream_tokens) for _ in streams]
    long_prompts = [prompts.draw(plan.long_prompt_tokens) for _ in range(plan.prompts)]
    steady = asyncio.Event()

    def on_token(_: Answer) -> None:
        if not steady.is_set() and all(len(stream.arrivals_s) >= plan.steady_tokens for stream in streams):
            steady.set()

    windows = []
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client.ask_into(stream, question, on_token))
            for stream, question in zip(streams, questions, strict=True)
        ]
        try:
            async with asyncio.timeout(_STREAMS_BEGIN_TIMEOUT_S):
                await steady.wait()
        except TimeoutError:
            message = f"{plan.streams} streams were not decoding within {_STREAMS_BEGIN_TIMEOUT_S:g} s"
            raise DeadlineError(message) from None
        since_s = time.monotonic()
        for prompt in long_prompts:
            await asyncio.sleep(plan.pause_s)
            answer = await client.ask(Question(prompt, 1, server.has_account))
            windows.append(Window(answer.sent_s, answer.arrivals_s[0]))
            seen.long_answers.append(answer)
        await asyncio.sleep(plan.pause_s)
        for task in tasks:
            task.cancel()
    seen.windows += windows
    for stream in streams:
        disturbed_s, quiet_s = split_gaps(stream.arrivals_s, windows, since_s)
        seen.disturbed_s += disturbed_s
        seen.quiet_s += quiet_s
        seen.arrivals += len(stream.arrivals_s)
        seen.reads += stream.reads
    await asyncio.sleep(_SETTLE_S)  # the abandoned streams leave the engine
