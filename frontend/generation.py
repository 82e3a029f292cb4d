"""What the faces ask of the dispatcher, and what they get back: tokens, never text.

The faces (`frontend.http`, `frontend.grpc_face`) turn a client's request into a `TokenRequest`; the
dispatcher (`frontend.dispatch`) turns that into a stream of `TokenDelta` by way of two workers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from frontend.admission.claim import DEFAULT_CLAIM, Claim
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One sequence to generate; `n > 1` is that many of these.

    Attributes:
        sampling: as the workers get it: `max_tokens` set, end-of-sequence ids in `stop_token_ids` (unless
            `ignore_eos`), no stop strings.
        claim: whose it is, and how urgent.
        cache_salt: of the prefix cache that it shares (`frontend.cache_salt`).
        on_computed: called when a prefill worker has computed the prompt, if one does.
    """

    request_id: str
    model: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    claim: Claim = DEFAULT_CLAIM
    on_computed: Callable[[], None] | None = None
    cache_salt: str = ""


class TokenDelta(msgspec.Struct, frozen=True):
    """Tokens that arrived together. The last one has a `finish_reason` and an `account`.

    An earlier one may carry the account so far: an answer that a stop string ends is closed before its last delta.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    stop_reason: str = ""
    account: RequestAccount | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that at least one worker serves now."""

    name: str
    max_model_len: int
    prefill_workers: int
    decode_workers: int
    created_unix_s: int = field(default=0)


class Dispatcher(Protocol):
    """Sends requests to workers. Two implementations: the cluster's, and a scripted one in tests of the faces."""

    @property
    def ready(self) -> bool:
        """Whether at least one decode worker is ready."""
        ...

    def models(self) -> list[ServedModel]:
        """Models with at least one ready decode worker."""
        ...

    def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream the answer. Closing or cancelling the generator aborts the request on every worker.

        Raises:
            ModelNotFoundError, NoWorkerError, WorkerLostError, DeadlineError, InvalidRequestError.
        """
        ...
