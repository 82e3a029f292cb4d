"""Which workers a request goes to: one pure function of plain data.

It sends a prompt where the least work is before it: prompt tokens for prefill, requests (then KV use) for
decode. A worker that has the beginning of the prompt already is preferred as far as that saves more than it
costs. Two workers are a pair when KV blocks can travel between them; one on the same host goes before all others.
A prompt goes to decode alone when nothing would be moved, or when no prefill worker can be used; the second is
a fallback and has a name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

from frontend import paths
from frontend.outstanding import Outstanding
from slipstream.errors import ModelNotFoundError, NoWorkerError
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState

RETRY_AFTER_S = 2.0
"""What a client is told to wait when no worker is there: about the time in which one is found again."""

FAMILIAR_SHARE = 0.5
"""A decode worker that has this share of the prompt is familiar with it; less is often a common system prompt."""

FAMILIAR_SLACK = 2
"""Requests that a familiar decode worker may have beyond the least loaded one and still be preferred to it."""


class Fallback(StrEnum):
    """Why a prompt that should have gone through a prefill worker is computed by decode alone."""

    NO_PREFILL_WORKER = "no_prefill_worker"
    NO_PATH = "no_path"
    PREFILL_LOST = "prefill_lost"
    PREFILL_TIMEOUT = "prefill_timeout"
    PREFILL_REFUSED = "prefill_refused"
    PREFILL_FAILED = "prefill_failed"


@dataclass(frozen=True, slots=True)
class Ask:
    """What the router needs to know of a request.

    Attributes:
        max_tokens: tokens to generate at most; 0 when unknown.
        excluded: workers that already failed this request.
        known: by worker id, tokens of the prompt's beginning whose KV blocks the worker has.
    """

    model: str
    prompt_tokens: int
    max_tokens: int = 0
    excluded: AbstractSet[str] = frozenset()
    known: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One registered worker as this frontend sees it now.

    Attributes:
        suspect: a call to it failed a moment ago.
    """

    record: WorkerRecord
    suspect: bool = False
    outstanding: Outstanding = field(default_factory=Outstanding)


@dataclass(frozen=True, slots=True)
class Route:
    """The decision. `fallback` is set when a prefill worker should have taken part but cannot."""

    decode: WorkerRecord
    prefill: WorkerRecord | None
    reason: str
    fallback: Fallback | None = None


def choose(ask: Ask, candidates: Sequence[Candidate], *, tie_break: str = "") -> Route:
    """Choose one decode worker, and one prefill worker unless decode does it alone.

    Among equals the choice is stable; `tie_break` (a frontend's own name) makes different frontends prefer
    different workers, so that idle clusters are not herded onto one.

    Raises:
        ModelNotFoundError: no worker in any state serves the model.
        NoWorkerError: no decode worker of the model can take a request now.
    """
    of_model = [one for one in candidates if one.record.model == ask.model]
    if not of_model:
        raise ModelNotFoundError(f"the model {ask.model!r} does not exist", param="model")
    usable = [one for one in of_model if takes_requests(one, ask.excluded)]
    decodes = _that_fit(
        [one for one in usable if one.record.role == Role.ROLE_DECODE], ask.prompt_tokens + ask.max_tokens
    )
    if not decodes:
        raise NoWorkerError(_why_none(ask, of_model), retry_after_s=RETRY_AFTER_S)
    decodes = _by_preference(ask, decodes, tie_break)
    if ask.prompt_tokens <= 1:
        return Route(decodes[0].record, None, "nothing_to_move")
    prefills = _that_fit([one for one in usable if one.record.role == Role.ROLE_PREFILL], ask.prompt_tokens)
    if not prefills:
        return Route(decodes[0].record, None, "decode_alone", Fallback.NO_PREFILL_WORKER)
    for decode, partners in _partners(decodes, prefills):
        return Route(decode.record, _least_prefill(ask, partners, tie_break), "least_outstanding_work")
    return Route(decodes[0].record, None, "decode_alone", Fallback.NO_PATH)


def alone(route: Route, fallback: Fallback | None) -> Route:
    """The same route without its prefill worker."""
    return Route(route.decode, None, "decode_alone", fallback)


def takes_requests(one: Candidate, excluded: AbstractSet[str]) -> bool:
    """Whether a worker may be sent this request."""
    return one.record.state == WorkerState.READY and not one.suspect and one.record.worker_id not in excluded


def _that_fit(candidates: list[Candidate], tokens: int) -> list[Candidate]:
    """Those whose context is long enough; all when none is, so that a worker says what its limit is."""
    fitting = [one for one in candidates if not 0 < one.record.capacity.max_model_len < tokens]
    return fitting or candidates


def _by_preference(ask: Ask, decodes: list[Candidate], tie_break: str) -> list[Candidate]:
    """Decode workers, the least loaded first, unless one that is familiar with the prompt is not much busier."""

    def cost(one: Candidate) -> tuple[bool, int, float, bytes]:
        return _is_full(ask, one), one.outstanding.requests, _kv_use(one), _tie(one, tie_break)

    ordered = sorted(decodes, key=cost)
    allowed = ordered[0].outstanding.requests + FAMILIAR_SLACK
    familiar = [
        one
        for one in ordered
        if ask.known.get(one.record.worker_id, 0) >= max(1, FAMILIAR_SHARE * ask.prompt_tokens)
        and one.outstanding.requests <= allowed
        and not _is_full(ask, one)
    ]
    if familiar:
        favourite = max(familiar, key=lambda one: ask.known[one.record.worker_id])  # the first of equals
        ordered.remove(favourite)
        ordered.insert(0, favourite)
    return ordered


def _is_full(ask: Ask, one: Candidate) -> bool:
    """Whether the prompt would have to wait for KV blocks."""
    used, total = one.record.load.blocks_used, one.record.capacity.blocks
    needed = -(-(ask.prompt_tokens + 1) // max(1, one.record.capacity.block_tokens))
    return total > 0 and used + needed > total


def _partners(decodes: list[Candidate], prefills: list[Candidate]) -> Iterator[tuple[Candidate, list[Candidate]]]:
    """Each decode worker that has any with the prefill workers it can receive from: pairs on one host first."""
    reachable = [one for one in prefills if one.record.transfer.address]
    by_host = defaultdict[str, list[Candidate]](list)
    for one in reachable:
        by_host[one.record.host_id].append(one)
    for decode in decodes:
        beside = by_host.get(decode.record.host_id, []) if decode.record.host_id else []
        if partners := _unbroken(decode, beside):
            yield decode, partners
    crossing = [(one, paths.crossing(one.record)) for one in reachable]
    for decode in decodes:
        own = paths.crossing(decode.record)
        if partners := _unbroken(decode, [one for one, transports in crossing if own & transports]):
            yield decode, partners


def _unbroken(decode: Candidate, prefills: list[Candidate]) -> list[Candidate]:
    broken = paths.broken_senders(decode.record) if prefills else set()
    return [one for one in prefills if not paths.is_broken(one.record, broken)]


def _least_prefill(ask: Ask, candidates: list[Candidate], tie_break: str) -> WorkerRecord:
    def cost(one: Candidate) -> tuple[int, float, bytes]:
        # What it has not to compute of this prompt weighs as much as what waits there.
        waiting = one.outstanding.prompt_tokens - ask.known.get(one.record.worker_id, 0)
        return waiting, _kv_use(one), _tie(one, tie_break)

    return min(candidates, key=cost).record


def _kv_use(one: Candidate) -> float:
    # In tenths: a block more or less is no reason to leave the worker whose prefix cache is warm.
    total = one.record.capacity.blocks
    return round(one.record.load.blocks_used / total, 1) if total else 0.0


def _tie(one: Candidate, tie_break: str) -> bytes:
    return blake2b(f"{tie_break}/{one.record.worker_id}".encode(), digest_size=8).digest()


def _why_none(ask: Ask, of_model: list[Candidate]) -> str:
    decodes = [one for one in of_model if one.record.role == Role.ROLE_DECODE]
    if not decodes:
        return f"no decode worker of model {ask.model!r} is registered"
    states = sorted({_condition(one, ask.excluded) for one in decodes})
    return f"no decode worker of model {ask.model!r} can take a request: {len(decodes)} registered, {', '.join(states)}"


def _condition(one: Candidate, excluded: AbstractSet[str]) -> str:
    if one.record.worker_id in excluded:
        return "failed this request"
    if one.suspect:
        return "not answering"
    return WorkerState.Name(one.record.state).lower()
