"""Clients that stream all the time, compare every token, and note how long they had to wait for it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc.aio

from slipstream.client import Account, AsyncClient
from slipstream.client.connection import CHANNEL_OPTIONS
from slipstream.errors import SlipstreamError
from slipstream.v1.inference_pb2_grpc import InferenceStub
from tests.faults.case import Measured, Stream

if TYPE_CHECKING:  # exists for the type checker alone
    from slipstream.v1.inference_pb2_grpc import InferenceAsyncStub

# Longer than all limits of the suite's settings together: what takes longer is a hang.
HANG_S = 120.0
_AFTER_ERROR_S = 0.5
_POLL_S = 0.01

Pair = tuple[list[int], list[int]]
"""A prompt, and what a plain engine answers to it."""


class OwnConnection(AsyncClient):
    """A client with a connection of its own: gRPC would let all to one address share one, which is to one process."""

    def _stub(self) -> InferenceAsyncStub:
        if self._lazy_stub is None:
            options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
            self._channel = grpc.aio.insecure_channel(self._target, options=options)
            self._lazy_stub = InferenceStub(self._channel)
        return self._lazy_stub


class Load:
    """Use `loading`.

    Attributes:
        measured: so far.
        open: streams that are under way; by number, the tokens each has.
    """

    def __init__(self, targets: Sequence[str], pool: Sequence[Pair], stream: Stream, seed: int) -> None:
        self.measured = Measured()
        self.open: dict[int, int] = {}
        self.stream = stream
        self._pool = pool
        self._rng = random.Random(seed)
        self._clients = [OwnConnection(target, timeout_s=2 * HANG_S) for target in targets]
        self._stopping = False
        self._number = 0

    async def follow(self, which: int) -> None:
        """One stream after another, until `stop`."""
        while not self._stopping:
            if not await self.ask(which):
                await asyncio.sleep(_AFTER_ERROR_S)

    async def ask(self, which: int = 0) -> bool:
        """One request of the client of that number; whether it was answered."""
        prompt, right = self._rng.choice(self._pool)
        count = min(len(right), self.stream.tokens)
        self._number += 1
        number, measured = self._number, self.measured
        measured.requests += 1
        self.open[number] = 0
        tokens: list[int] = []
        ended = False
        try:
            async with asyncio.timeout(HANG_S):
                account = await self._read(number, which, prompt, count, tokens)
            ended = True
            measured.answered += 1
            measured.moved += account is not None and (account.attempts > 1 or bool(account.fallback))
        except TimeoutError:
            measured.hung += 1
        except SlipstreamError as error:
            measured.lost += 1
            measured.codes[error.code] = measured.codes.get(error.code, 0) + 1
        except Exception as error:
            measured.untyped += 1
            measured.codes[type(error).__name__] = measured.codes.get(type(error).__name__, 0) + 1
        finally:
            del self.open[number]
        if tokens != right[: len(tokens)] or (ended and len(tokens) != count):
            measured.wrong += 1
        return ended

    async def _read(self, number: int, which: int, prompt: list[int], count: int, tokens: list[int]) -> Account | None:
        client = self._clients[which % len(self._clients)]
        account, heard_s = None, time.monotonic()
        stream = client.generate(prompt, max_tokens=count, temperature=0.0, ignore_eos=True)
        async with stream:
            try:
                async for piece in stream:
                    now_s = time.monotonic()
                    self.measured.silence_s = max(self.measured.silence_s, now_s - heard_s)
                    heard_s = now_s
                    tokens += piece.token_ids
                    self.open[number] = len(tokens)
                    account = piece.account or account
            finally:
                self.measured.silence_s = max(self.measured.silence_s, time.monotonic() - heard_s)
        return account

    def stop(self) -> None:
        """No stream is begun any more."""
        self._stopping = True

    async def until_streaming(self, count: int = 2, timeout_s: float = HANG_S) -> None:
        """Until so many streams have tokens, and are not at their end."""
        async with asyncio.timeout(timeout_s):
            while sum(0 < tokens < self.stream.tokens for tokens in self.open.values()) < count:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)

    async def until_answered(self, more: int, timeout_s: float = HANG_S) -> None:
        """Until so many more answers than now are complete."""
        wanted = self.measured.answered + more
        async with asyncio.timeout(timeout_s):
            while self.measured.answered < wanted:  # noqa: ASYNC110 - counted by other tasks
                await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """End the connections."""
        for client in self._clients:
            await client.aclose()


@asynccontextmanager
async def loading(
    targets: Sequence[str], pool: Sequence[Pair], stream: Stream, *, seed: int, clients: int = 4
) -> AsyncIterator[Load]:
    """Streams from before the block begins until after it ends; the last of them have ended when it is left.

    Args:
        targets: frontends; clients are spread over them. A frontend of several processes gets each connection for one.
    """
    load = Load([targets[n % len(targets)] for n in range(clients)], pool, stream, seed)
    tasks = [asyncio.create_task(load.follow(n), name=f"stream {n}") for n in range(stream.at_once)]
    try:
        yield load
        load.stop()
        await asyncio.wait(tasks, timeout=HANG_S + 5.0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await load.close()
