"""A dispatcher that says what a test tells it to, at the boundary where the cluster would be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from frontend.generation import ServedModel, TokenDelta, TokenRequest
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount

Step = TokenDelta | Exception | asyncio.Event
Script = Callable[[TokenRequest], Sequence[Step]]


def tokens(*token_ids: int) -> TokenDelta:
    return TokenDelta(token_ids)


def last(
    *token_ids: int,
    reason: FinishReason.ValueType = FinishReason.FINISH_REASON_STOP,
    account: RequestAccount | None = None,
) -> TokenDelta:
    return TokenDelta(token_ids, finish_reason=reason, account=account or RequestAccount())


@dataclass
class ScriptedDispatcher:
    """Plays `script` for every request: yields its deltas, raises its errors, waits at its events.

    Attributes:
        requests: all that came, in order.
        running: ids of the requests whose generators are open.
    """

    script: Script = field(default=lambda request: [last()])
    served: list[ServedModel] = field(default_factory=lambda: [ServedModel("tiny", 256, 1, 1, 1_700_000_000)])
    ready: bool = True
    requests: list[TokenRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def models(self) -> list[ServedModel]:
        return self.served

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        await self._note(self.running.add, request.request_id)
        try:
            for step in self.script(request):
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            await self._note(self.running.discard, request.request_id)

    async def until_running(self, count: int) -> None:
        """Wait until so many requests are open; for the tests of those that are given up."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: len(self.running) == count)

    async def _note(self, change: Callable[[str], None], request_id: str) -> None:
        async with self._changed:
            change(request_id)
            self._changed.notify_all()
