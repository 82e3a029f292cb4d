"""What the client hands out: plain frozen data, free of protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from slipstream.errors import WorkerLostError
from slipstream.v1 import inference_pb2, sampling_pb2

ROUTE_KEY = "x-slipstream-route"
"""Trailing metadata of an answer, and a header of the HTTP face."""

FinishReason = Literal["stop", "length", "abort"]

_FINISH: dict[int, FinishReason] = {
    sampling_pb2.FINISH_REASON_STOP: "stop",
    sampling_pb2.FINISH_REASON_LENGTH: "length",
    sampling_pb2.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `cached_tokens` are prompt tokens that no worker had to compute."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token, and the asked number of most likely ones, best first."""

    chosen: Candidate
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """What one request cost and where: the fields of `slipstream.v1.RequestAccount`, where each is explained."""

    prefill_worker: str
    decode_worker: str
    prompt_tokens: int
    prefill_computed_tokens: int
    prefill_cached_tokens: int
    decode_computed_tokens: int
    decode_cached_tokens: int
    kv_blocks_moved: int
    kv_bytes_moved: int
    transfer_s: float
    prefill_s: float
    transport: str
    fallback: str
    attempts: int
    partial: bool
    transfer_exposed_s: float
    kv_wire_bytes: int
    kv_spans_resent: int
    migrations: int
    recomputed_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What arrived together. The last piece of an answer has a finish reason, the usage and the account.

    Attributes:
        text: what these tokens add to the text; may be empty, as a character can take several tokens.
        stop_reason: the stop string or token id that ended the answer, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: str
    usage: Usage | None
    account: Account | None
    request_id: str
    model: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `logprobs` is empty unless they were asked for.

    Attributes:
        route: why it went to its workers, in a word; `slipstream explain` has the rest.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str
    usage: Usage
    account: Account | None
    logprobs: tuple[TokenLogprob, ...]
    request_id: str
    model: str
    route: str = ""


@dataclass(slots=True)
class Ending:
    """What is known of an answer when it has ended; empty until then."""

    route: str = ""

    def take(self, trailing_metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """As the frontend sent it."""
        self.route = next((str(value) for key, value in trailing_metadata or () if key == ROUTE_KEY), "")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that is served now. `max_model_len` is in tokens, prompt and answer together."""

    id: str
    max_model_len: int
    prefill_workers: int
    decode_workers: int
    created_unix_s: int


def piece_from_wire(message: inference_pb2.GenerateResponse) -> Piece:
    return Piece(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprob(entry) for entry in message.logprobs),
        finish_reason=_FINISH.get(message.finish_reason),
        stop_reason=message.stop_reason,
        usage=_usage(message.usage) if message.HasField("usage") else None,
        account=_account(message.account) if message.HasField("account") else None,
        request_id=message.request_id,
        model=message.model,
    )


def completion_from_pieces(pieces: Sequence[Piece], route: str = "") -> Completion:
    """Put an answer together.

    Raises:
        WorkerLostError: the stream ended without saying why, so the answer may be cut.
    """
    last = pieces[-1] if pieces else None
    if last is None or last.finish_reason is None:
        raise WorkerLostError("the answer ended without a finish reason; it may be incomplete")
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    return Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=token_ids,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage or Usage(prompt_tokens=0, completion_tokens=len(token_ids), cached_tokens=0),
        account=last.account,
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        request_id=last.request_id,
        model=last.model,
        route=route,
    )


def models_from_wire(models: Iterable[inference_pb2.Model]) -> list[ModelInfo]:
    return [
        ModelInfo(
            id=model.id,
            max_model_len=model.max_model_len,
            prefill_workers=model.prefill_workers,
            decode_workers=model.decode_workers,
            created_unix_s=model.created,
        )
        for model in models
    ]


def _usage(message: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )


def _account(message: sampling_pb2.RequestAccount) -> Account:
    return Account(**{field.name: getattr(message, field.name) for field in fields(Account)})


def _logprob(message: sampling_pb2.TokenLogprobs) -> TokenLogprob:
    return TokenLogprob(
        chosen=Candidate(message.chosen.token_id, message.chosen.logprob),
        top=tuple(Candidate(candidate.token_id, candidate.logprob) for candidate in message.top),
    )
