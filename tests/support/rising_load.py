"""Load that a test changes while it runs, each request with a prompt of its own; what became of each is kept."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from slipstream.client import AsyncClient


@dataclass(slots=True)
class Asked:
    """One request, and what became of it."""

    prompt: list[int]
    sent_s: float
    ttft_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    error: str = ""


@dataclass(slots=True)
class RisingLoad:
    """Requests come at `rate_per_s` whatever becomes of them, and where fewer than `at_once` are open.

    Attributes:
        tokens: the token ids that prompts are made of.
    """

    client: AsyncClient
    prompt_tokens: int
    max_tokens: int
    tokens: range
    rate_per_s: float = 0.0
    at_once: int = 0
    asked: list[Asked] = field(default_factory=list)
    _ttft_s: list[float] = field(default_factory=list)
    _worst_ttft_s: float = 0.0
    _open: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(5))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send while the block runs; then wait for what is on its way."""
        async with asyncio.TaskGroup() as group:
            sending = asyncio.create_task(self._send(group))
            try:
                yield
            finally:
                sending.cancel()
                await asyncio.wait([sending])

    def recent_ttft_s(self, count: int = 8) -> float:
        """The median of the newest first tokens; 0 before there are so many."""
        return statistics.median(self._ttft_s[-count:]) if len(self._ttft_s) >= count else 0.0

    async def rise_until(self, limit_s: float, *, deadline_s: float) -> None:
        """Keep more requests open until first tokens take longer than `limit_s`, however fast the machine is.

        More come only when as many as are open have been answered, so that a slow machine is not flooded.

        Raises:
            AssertionError: first tokens still come sooner after `deadline_s` seconds.
        """
        answered, ends_s = len(self._ttft_s), time.monotonic() + deadline_s
        while self.recent_ttft_s() <= limit_s:
            assert time.monotonic() < ends_s, f"TTFT {self.recent_ttft_s():.2f} s with {self.at_once} at once"
            if len(self._ttft_s) >= answered + self.at_once:
                answered, self.at_once = len(self._ttft_s), 2 * self.at_once
            await asyncio.sleep(0.1)

    @property
    def worst_ttft_s(self) -> float:
        """The longest that `recent_ttft_s` has been."""
        return self._worst_ttft_s

    def failed(self) -> list[str]:
        return [one.error for one in self.asked if one.error]

    async def answer(self, prompt: list[int]) -> list[int]:
        """What the cluster says to a prompt."""
        answer = self.client.generate(prompt, max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True)
        return list((await answer.collect()).token_ids)

    async def wrong(self, sample: int) -> list[Asked]:
        """Those of a sample to which the same question now gets another answer."""
        chosen = self._random.sample(self.asked, min(sample, len(self.asked)))
        return [one for one in chosen if await self.answer(one.prompt) != one.token_ids]

    async def _send(self, group: asyncio.TaskGroup) -> None:
        next_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            while self._open < self.at_once or (self.rate_per_s and next_s <= now_s):
                next_s = max(next_s, now_s - 1.0) + 1.0 / self.rate_per_s if self.rate_per_s else now_s
                self._open += 1
                group.create_task(self._ask())
            await asyncio.sleep(0.02)

    async def _ask(self) -> None:
        prompt = [self._random.choice(self.tokens) for _ in range(self.prompt_tokens)]
        one = Asked(prompt, time.monotonic())
        self.asked.append(one)
        try:
            answer = self.client.generate(prompt, max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True)
            async for chunk in answer:
                if one.ttft_s is None:
                    one.ttft_s = time.monotonic() - one.sent_s
                    self._ttft_s.append(one.ttft_s)
                    self._worst_ttft_s = max(self._worst_ttft_s, self.recent_ttft_s())
                one.token_ids.extend(chunk.token_ids)
        except Exception as error:  # whatever it is, the test tells of it
            one.error = repr(error)
        finally:
            self._open -= 1
