"""What a role asks of an engine: tokens in, tokens out.

`engine.vllm_engine` runs a real model. An engine that only keeps time can stand behind the same protocol.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from slipstream.v1.registry_pb2 import Capacity, Load
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """A prompt whose KV blocks are held for a decode worker.

    Attributes:
        handoff: for the decode worker; empty when there is nothing to move.
        computed_tokens, cached_tokens: prompt tokens that went through the model, and that did not have to.
    """

    handoff: bytes
    computed_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """Tokens that arrived together; the last one of a request has a `finish_reason` and an `account`."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    stop_reason: str = ""
    account: RequestAccount | None = None


class Engine(Protocol):
    """One engine. Closing an iterator, or cancelling a call, aborts the request and frees its blocks."""

    async def prefill(self, request_id: str, token_ids: Sequence[int], lease: tuple[int, int]) -> PromptComputed:
        """Compute a prompt and hold its blocks under the lease (slot, nonce).

        Raises:
            InvalidRequestError, ContextLengthError: the prompt cannot be computed here.
            EngineDeadError: the engine has died.
        """
        ...

    def decode(
        self, request_id: str, token_ids: Sequence[int], sampling: SamplingParams, handoff: bytes
    ) -> AsyncGenerator[TokensGenerated, None]:
        """Generate. With a handoff the prompt's missing blocks are received first; when that fails they are computed.

        Raises:
            InvalidRequestError, ContextLengthError: prompt or sampling cannot be served.
            EngineDeadError: the engine has died.
        """
        ...

    def capacity(self) -> Capacity: ...

    def load(self) -> Load:
        """Queue lengths and KV use as of the last step."""
        ...

    @property
    def alive(self) -> bool: ...

    def shutdown(self) -> None: ...
