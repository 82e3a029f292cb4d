"""What the router answers: the workers, why, and what it expects to happen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from slipstream.v1.registry_pb2 import WorkerRecord


class Fallback(StrEnum):
    """Why a prompt that should have gone through a prefill worker is computed by decode alone."""

    NO_PREFILL_WORKER = "no_prefill_worker"
    NO_PATH = "no_path"
    PREFILL_LOST = "prefill_lost"
    PREFILL_TIMEOUT = "prefill_timeout"
    PREFILL_REFUSED = "prefill_refused"
    PREFILL_FAILED = "prefill_failed"


class Reason(StrEnum):
    """Why these workers, in a word: a label of metrics and a response header."""

    LEAST_TIME = "least_time"
    PREFIX_HIT = "prefix_hit"
    NOTHING_TO_MOVE = "nothing_to_move"
    PREFIX_ON_DECODE = "prefix_on_decode"
    HANDOFF_NOT_WORTH_IT = "handoff_not_worth_it"
    DECODE_ALONE = "decode_alone"
    SESSION = "session"
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"
    POWER_OF_TWO = "power_of_two"


@dataclass(slots=True)  # frozen ones take twice as long to make, and each decision makes several
class Predicted:
    """The parts of one choice's cost, in seconds; `new_tokens` are the prompt's tokens that must be computed.

    Attributes:
        queue_s: until the prompt's computation begins.
        prefill_s: of the computation.
        transfer_s: what of the transfer is not hidden behind the computation.
        slot_s: how much longer the decode worker needs until it has a place and blocks for the request.
        itl_s: one step of the decode worker, this request included.
        output_tokens: steps that are reckoned with.
        others_s: what the choice costs the other requests, summed over them.
    """

    new_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float
    slot_s: float
    itl_s: float
    output_tokens: float
    others_s: float

    @property
    def ready_s(self) -> float:
        """Until the decode worker can begin."""
        return self.queue_s + self.prefill_s + self.transfer_s + self.slot_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.ready_s + self.itl_s

    @property
    def cost_s(self) -> float:
        """What is compared: seconds of waiting that the choice adds, to this request and to all others."""
        return self.ready_s + self.itl_s * self.output_tokens + self.others_s


@dataclass(slots=True)
class Considered:
    """One choice that was weighed; `prefill` is empty for decode alone."""

    prefill: str
    decode: str
    predicted: Predicted


@dataclass(slots=True)  # as above
class Route:
    """The decision. `fallback` is set when a prefill worker should have taken part but cannot.

    Attributes:
        new_tokens: of the prompt, that the computing worker has to compute; None where nobody looked.
        predicted: of the winner; None for policies that predict nothing.
        considered: the winner and what came next, the best first.
    """

    decode: WorkerRecord
    prefill: WorkerRecord | None
    reason: str
    fallback: Fallback | None = None
    new_tokens: int | None = field(default=None, compare=False)
    predicted: Predicted | None = field(default=None, compare=False)
    considered: tuple[Considered, ...] = field(default=(), compare=False)


def alone(route: Route, fallback: Fallback | None) -> Route:
    """The same route without its prefill worker. What was predicted was predicted of another one."""
    return replace(route, prefill=None, reason=Reason.DECODE_ALONE, fallback=fallback, new_tokens=None, predicted=None)
