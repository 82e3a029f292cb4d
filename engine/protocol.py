"""What a role asks of an engine: tokens in, tokens out.

`engine.vllm_engine` runs a real model. An engine that only keeps time can stand behind the same protocol.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from kv_transfer.permits import Permit
from slipstream.v1.registry_pb2 import Capacity, Load, TransferEndpoint, TransferPath
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams, TokenLogprobs
from slipstream.v1.worker_pb2 import Handoff, Tier


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """When a request reached its stages in the engine: readings of `time.monotonic()`, each not before the last.

    Attributes:
        queued_s: the engine has taken it up.
        scheduled_s: the first of it is computed; of a request that waits for blocks, once they are there.
        first_token_s: its prompt is computed.
        last_token_s: it is finished.
    """

    queued_s: float
    scheduled_s: float
    first_token_s: float
    last_token_s: float


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """A prompt that is in the KV cache. Each of its tokens is counted once.

    Attributes:
        computed_tokens: went through the model.
        cached_tokens: were in the prefix cache.
        received_tokens: came from another worker.
    """

    computed_tokens: int
    cached_tokens: int
    received_tokens: int
    times: EngineTimes | None = None


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """Tokens that arrived together; the last one of a request has a `finish_reason`, an `account` and `times`."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    stop_reason: str = ""
    account: RequestAccount | None = None
    times: EngineTimes | None = None


@dataclass(frozen=True, slots=True)
class CacheChange:
    """What one tier of an engine's prefix cache took up and dropped, by `slipstream.block_keys`.

    Attributes:
        stored: blocks that it has now and had not before.
        removed: blocks that it had and has no more. A key is never in both.
        reset: nothing that was said before holds, in any tier: `stored` is all there is.
    """

    stored: Sequence[int] = ()
    removed: Sequence[int] = ()
    tier: Tier.ValueType = Tier.TIER_DEVICE
    reset: bool = False


class Engine(Protocol):
    """One engine. Closing an iterator, or cancelling a call, aborts the request and frees its blocks."""

    async def prefill(
        self,
        request_id: str,
        token_ids: Sequence[int],
        lease: tuple[int, int],
        *,
        permit: Permit,
        source: Handoff | None,
        cached_only: bool,
        cache_salt: str = "",
    ) -> PromptComputed:
        """Compute a prompt, and hand its blocks over, while it is computed, to whom this permit is for.

        The blocks are held under the lease (slot, nonce); returns when the prompt is computed, while they still are.

        Args:
            source: receive what this worker lacks from there instead of computing it, as far as possible.
            cached_only: hand over what is cached, which is all but the last token. When it is not, the lease ends with
                `NOT_CACHED` and this never returns: cancel it.
            cache_salt: only requests with the same one share what is in the prefix cache.

        Raises:
            InvalidRequestError, ContextLengthError: the prompt cannot be computed here.
            EngineDeadError: the engine has died.
        """
        ...

    def decode(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        handoff: Handoff | None,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokensGenerated, None]:
        """Generate. With a handoff the prompt's missing blocks are received first; when that fails they are computed.

        Raises:
            InvalidRequestError, ContextLengthError: prompt or sampling cannot be served.
            EngineDeadError: the engine has died.
        """
        ...

    async def probe_path(self, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
        """Measure the way from a worker's transfer agent to this one; one that does not work has an `error`.

        Args:
            worker_id: of the peer.
            transport: shm, ucx or nixl; empty for the one that would be chosen.

        Raises:
            TransferError: this worker's own agent does not answer.
            EngineDeadError: the engine has died.
        """
        ...

    async def admit(self, keys: Collection[bytes]) -> None:
        """Exchange blocks with the transfer agents that have these public keys, and with no others.

        Raises:
            TransferError: this worker's own agent does not answer.
            EngineDeadError: the engine has died.
        """
        ...

    def transfer(self) -> TransferEndpoint | None:
        """Where this worker's transfer agent is reached; None before it listens."""
        ...

    def capacity(self) -> Capacity: ...

    def load(self) -> Load:
        """Queue lengths and KV use as of the last step."""
        ...

    def cache_changes(self) -> AsyncIterator[CacheChange] | None:
        """What the prefix cache takes up and drops, in order, from the engine's start on; None: it does not tell.

        Called once, by `engine.cache_feed`, in the event loop; ends with the engine. Its reader is always quick, so
        that changes may be queued without a limit. Several steps' changes may come as one.
        """
        ...

    @property
    def alive(self) -> bool: ...

    def shutdown(self) -> None: ...
