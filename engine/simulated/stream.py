"""One request's way through the simulated engine, as its caller sees it: tokens, block keys, times, account."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.protocol import EngineTimes
from engine.simulated.request import Request
from engine.simulated.tokens import Answer
from slipstream.block_keys import extend
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount

_EMPTY: array[int] = array("I")


@dataclass(slots=True)
class Moved:
    """What was received for it; `failure` is an error code, empty when it went well or was not tried."""

    blocks: int = 0
    bytes_moved: int = 0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    failure: str = ""


@dataclass(slots=True, eq=False)
class Stream:
    """A request in the engine.

    Attributes:
        news: set when there are tokens to fetch, or it is over.
        admitted: it has its blocks, for receiving or for computing.
        computed: once its prompt is.
        stop_ids: a token that ends the answer, once there are `min_tokens`.
    """

    request: Request
    prompt: array[int]
    block_tokens: int
    root_key: int
    answer: Answer | None = None
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    computed: asyncio.Event = field(default_factory=asyncio.Event)
    moved: Moved = field(default_factory=Moved)
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    stop_reason: str = ""
    failure: Exception | None = None
    count: int = 0
    """Tokens generated."""
    queued_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    _unfetched: list[int] = field(default_factory=list)
    _tail: array[int] = field(default_factory=lambda: array("I"))
    """Tokens of the block that is not full."""

    def __post_init__(self) -> None:
        whole = len(self.request.keys) * self.block_tokens
        self._tail = self.prompt[whole:] if self.answer is not None else _EMPTY

    def generate(self, until: int) -> None:
        """Say the tokens up to that number, unless a stop token comes first."""
        assert self.answer is not None
        while self.count < until and not self.finish_reason:
            token = self.answer.next()
            self.count += 1
            self._unfetched.append(token)
            self._tail.append(token)
            if len(self._tail) == self.block_tokens:
                keys = self.request.keys
                keys += extend(keys[-1] if keys else self.root_key, self._tail, self.block_tokens)
                self._tail = array("I")
            if token in self.stop_ids and self.count >= self.min_tokens:
                self.finish_reason = FinishReason.FINISH_REASON_STOP
                self.stop_reason = str(token)
        self.news.set()

    def fetch(self) -> Sequence[int]:
        tokens, self._unfetched = self._unfetched, []
        self.news.clear()
        return tokens

    def times(self) -> EngineTimes | None:
        """None for what has not got that far, or has in an order that says nothing."""
        last_s = self.last_token_s or self.first_token_s
        if not 0.0 < self.queued_s <= self.scheduled_s <= self.first_token_s <= last_s:
            return None
        return EngineTimes(self.queued_s, self.scheduled_s, self.first_token_s, last_s)

    def account(self, transport: str) -> RequestAccount:
        request, moved = self.request, self.moved
        return RequestAccount(
            prompt_tokens=request.prompt_tokens,
            decode_computed_tokens=request.computed_tokens,
            decode_cached_tokens=request.cached_tokens,
            kv_blocks_moved=moved.blocks,
            kv_bytes_moved=moved.bytes_moved,
            kv_wire_bytes=moved.bytes_moved,
            transfer_exposed_s=moved.exposed_s,
            transfer_s=moved.transfer_s,
            transport=transport if moved.blocks else "",
            fallback=f"transfer_{moved.failure}" if moved.failure else "",
        )
