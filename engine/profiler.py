"""Measures a live engine: how long prompts take by tokens, steps by batch and context, and what its KV cache holds.

All of it through the Engine protocol, one thing at a time on an engine that does nothing else, so the figures are
those of a worker in the same conditions. Each is the lower quartile of some repetitions: what else runs on the machine
only ever adds time.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from engine.protocol import Engine, EngineTimes
from slipstream.errors import StartupError, TransferError
from slipstream.performance import DecodePoint, PrefillPoint, Profile
from slipstream.v1.sampling_pb2 import SamplingParams

Say = Callable[[str], None]

# Of blocks within this host, where a worker's own transfer agent cannot be measured.
_UNKNOWN_BYTES_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured.

    Attributes:
        prefill: prompt lengths; those that do not fit the context are left out.
        batches, contexts: of decode steps; the largest are left out where the cache does not hold all of them.
        steps: of each decode point.
        repeats: of each prompt length.
    """

    prefill: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32)
    contexts: Sequence[int] = (129, 513, 1537)  # the last token of a prompt is never a hit: so all blocks are
    steps: int = 16
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class Facts:
    """What the engine's owner knows of it, for `Profile`."""

    name: str
    model: str
    device: str
    source: str
    step_tokens: int
    vocabulary: int
    ranks: int = 1


async def measure(
    engine: Engine, facts: Facts, grid: Grid, say: Say, clock: Callable[[], float] = time.monotonic
) -> Profile:
    """A profile of the engine; takes minutes.

    Args:
        clock: by which it is measured; `cpu_clock.cpu_seconds` for an engine of one thread beside other programs.

    Raises:
        StartupError: the engine's cache is too small to measure anything.
    """
    capacity = engine.capacity()
    room = capacity.blocks * capacity.block_tokens
    prober = _Prober(engine, random.Random(0), facts.vocabulary, clock)
    lengths = [tokens for tokens in grid.prefill if tokens < min(capacity.max_model_len, room)]
    contexts = [tokens for tokens in grid.contexts if tokens + grid.steps * 2 < min(capacity.max_model_len, room)]
    if len(lengths) < 2 or not contexts:
        raise StartupError(f"a context of {capacity.max_model_len} tokens and {capacity.blocks} blocks are too few")
    await prober.answer(prober.prompt(lengths[-1] // 2), 8)  # what happens once only, happens here
    prefill, overheads = [], []
    for tokens in lengths:
        seconds, overhead_s = await prober.prefill(tokens, grid.repeats if tokens < 1000 else max(1, grid.repeats // 2))
        prefill.append(PrefillPoint(tokens, seconds))
        overheads.append(overhead_s)
        say(f"prefill of {tokens} tokens: {seconds * 1e3:.1f} ms")
    most = min(capacity.max_running, (room - capacity.block_tokens) // (contexts[-1] + 2 * capacity.block_tokens))
    batches = [batch for batch in grid.batches if batch <= max(1, most)]
    decode = []
    for context in contexts:
        prompts = [prober.prompt(context) for _ in range(batches[-1])]
        for batch in batches:
            seconds = await prober.decode(prompts[:batch], grid.steps)
            decode.append(DecodePoint(batch, context + grid.steps, seconds))
            say(f"step of {batch} sequences with {context} tokens each: {seconds * 1e3:.1f} ms")
    rate, latency_s = await _transfer(engine)
    say(f"transfer: {rate / 1e6:.0f} MB/s, {latency_s * 1e3:.2f} ms")
    return Profile(
        name=facts.name,
        model=facts.model,
        device=facts.device,
        source=facts.source,
        measured_on=f"{datetime.now(UTC):%Y-%m-%d}",
        prefill=tuple(_rising(prefill)),
        decode=tuple(sorted(decode, key=lambda point: (point.batch, point.context_tokens))),
        block_tokens=capacity.block_tokens,
        block_bytes=capacity.block_bytes,
        blocks=capacity.blocks,
        step_tokens=facts.step_tokens,
        max_running=capacity.max_running,
        max_model_len=capacity.max_model_len,
        transfer_bytes_per_s=rate,
        transfer_latency_s=latency_s,
        overhead_s=max(0.0, statistics.median(overheads)),
        gpus=0 if facts.device.startswith("cpu") else facts.ranks,
    )


def _lower(values: list[float]) -> float:
    return max(1e-6, sorted(values)[(len(values) - 1) // 4])


def _rising(points: list[PrefillPoint]) -> list[PrefillPoint]:
    """A longer prompt never takes less: where it was measured so, that was noise."""
    seconds = 0.0
    risen = []
    for point in points:
        seconds = max(seconds, point.seconds)
        risen.append(PrefillPoint(point.tokens, seconds))
    return risen


class _Prober:
    """Asks the engine, with prompts that it has never seen."""

    def __init__(self, engine: Engine, source: random.Random, vocabulary: int, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._random = source
        self._vocabulary = vocabulary
        self._clock = clock
        self._asked = 0

    def prompt(self, tokens: int) -> list[int]:
        return [self._random.randrange(100, self._vocabulary) for _ in range(tokens)]

    async def answer(self, prompt: list[int], tokens: int) -> tuple[list[float], EngineTimes | None]:
        """When each token arrived (time.monotonic), and the engine's own times."""
        arrivals: list[float] = []
        times = await self._answer(prompt, tokens, lambda count: arrivals.extend([time.monotonic()] * count))
        return arrivals, times

    async def _answer(self, prompt: list[int], tokens: int, arrived: Callable[[int], None]) -> EngineTimes | None:
        self._asked += 1
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        times = None
        async with aclosing(self._engine.decode(f"profile-{self._asked}", prompt, sampling, None)) as stream:
            async for part in stream:
                arrived(len(part.token_ids))
                times = part.times or times
        return times

    async def prefill(self, tokens: int, repeats: int) -> tuple[float, float]:
        """Seconds in the engine, and what its caller waits besides: all is the first by any clock but the wall's."""
        inside, besides = [], []
        for _ in range(repeats):
            prompt = self.prompt(tokens)
            asked_s = self._clock()
            times = await self._answer(prompt, 1, lambda count: None)
            whole_s = inside_s = self._clock() - asked_s
            if times is not None and self._clock is time.monotonic:
                inside_s = times.first_token_s - times.scheduled_s
            inside.append(inside_s)
            besides.append(whole_s - inside_s)
        return _lower(inside), _lower(besides)

    async def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of a step in which all of these are in the batch."""
        for prompt in prompts:  # one by one into the prefix cache: then all begin together
            await self.answer(prompt, 1)
        marks: list[tuple[float, float]] = []
        tokens = 2 * steps
        mark: Callable[[int], None] = lambda count: marks.append((time.monotonic(), self._clock()))  # noqa: E731
        async with asyncio.TaskGroup() as group:
            group.create_task(self._answer(prompts[0], tokens, mark))
            others = [group.create_task(self.answer(prompt, tokens)) for prompt in prompts[1:]]
        answers = [other.result() for other in others]
        began_s = max((arrivals[0] for arrivals, _ in answers), default=0.0)
        ended_s = min((arrivals[-1] for arrivals, _ in answers), default=float("inf"))
        inside = [clock_s for wall_s, clock_s in marks if began_s <= wall_s <= ended_s]
        gaps = [after - before for before, after in pairwise(inside)]
        if not gaps:
            raise StartupError(f"the {len(prompts)} sequences never ran together; lower the batch sizes")
        return _lower(gaps)


async def _transfer(engine: Engine) -> tuple[float, float]:
    """Bytes a second and latency of blocks within this host."""
    endpoint = engine.transfer()
    if endpoint is not None:
        try:
            await engine.admit([endpoint.public_key])  # nobody else registers it here
            path = await engine.probe_path("itself", endpoint, "")
        except TransferError:
            return _UNKNOWN_BYTES_PER_S, 0.001
        if not path.error and path.bytes_per_s > 0:
            return path.bytes_per_s, path.latency_s
    return _UNKNOWN_BYTES_PER_S, 0.001
