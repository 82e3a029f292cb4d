"""What a frontend knows of one request: filled in on its way, told at its end to log, access log and trace.

Each face makes one record a request (`frontend.request_life`). Deeper parts find it by `current`, so that no
signature carries it; what runs without a face, as in tests of the dispatcher, finds none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from frontend.keys.guard import Caller
from slipstream.tracing import OFF, Span


@dataclass(slots=True)
class RequestRecord:
    """One request of a client. Times ending in `_s` are the face's clock, monotonic.

    Attributes:
        method: the HTTP method; `rpc` for gRPC.
        path: as the client wrote it; the name of the call for gRPC.
        started_ns: Unix time of `started_s`.
        status: HTTP status or gRPC status name, once there is one; `cancelled` for a client that left.
        key: id of the API key it came with.
        caller: whoever has that key.
        tenant: who asked, when that is known.
        service_class: its priority at admission.
        session: what the client calls the conversation.
        prompts: token ids, kept only if the access log names blocks.
        cache_salt: of the prefix cache that its prompts share.
        cached_tokens: prompt tokens that no worker had to compute.
        route: why its workers were chosen.
        attempts: dispatches, 1 when nothing went wrong.
        sequences: answers that were asked for.
        prefix: a global frontend's names for the beginnings of the prompt, as they came.
    """

    request_id: str
    method: str
    path: str
    started_s: float
    started_ns: int
    span: Span = OFF
    status: str = "cancelled"
    error: str = ""
    model: str = ""
    key: str = ""
    caller: Caller | None = field(default=None, repr=False)
    tenant: str = ""
    service_class: str = ""
    session: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompts: Sequence[Sequence[int]] = ()
    cache_salt: str = ""
    first_token_s: float | None = None
    last_token_s: float | None = None
    prefill_workers: list[str] = field(default_factory=list)
    decode_workers: list[str] = field(default_factory=list)
    route: str = ""
    fallback: str = ""
    attempts: int = 0
    sequences: int = 1
    prefix: str = ""

    def unix_ns(self, at_s: float) -> int:
        """A reading of the face's clock as Unix time."""
        return self.started_ns + int((at_s - self.started_s) * 1e9)

    def note_caller(self, caller: Caller) -> None:
        """It came with a key."""
        self.caller, self.key, self.tenant = caller, caller.key.key_id, caller.key.tenant

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.started_s

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens, of a request with one answer."""
        if self.first_token_s is None or self.last_token_s is None or self.completion_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.completion_tokens - 1)

    def note_route(self, prefill_worker: str, decode_worker: str, reason: str) -> None:
        """A sequence of the request goes to these workers."""
        self.route = reason
        self.attempts += 1
        if prefill_worker and prefill_worker not in self.prefill_workers:
            self.prefill_workers.append(prefill_worker)
        if decode_worker not in self.decode_workers:
            self.decode_workers.append(decode_worker)


CURRENT: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def current() -> RequestRecord | None:
    """The record of the request that this task works for."""
    return CURRENT.get()


def current_span() -> Span:
    """The trace of the request that this task works for; `OFF` when it is not traced."""
    record = CURRENT.get()
    return OFF if record is None else record.span
