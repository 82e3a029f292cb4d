"""A request that is on its way through a simulated cluster: its place in the queue, its workers, its shares of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from xxhash import xxh3_64_intdigest

from engine.simulated.request import Request
from frontend.admission.claim import DEFAULT_TENANT, Claim, Entry, Priority
from frontend.router.candidate import Share
from simulator.frontend import SimulatedFrontend
from simulator.journey import Journey
from simulator.worker import SimulatedWorker

_CLASSES = {one.label: one for one in Priority}


@cache
def claim_of(service_class: str, tenant: str) -> Claim:
    """What a trace's request claims; a class that is unknown is realtime."""
    return Claim(_CLASSES.get(service_class, Priority.REALTIME), tenant or DEFAULT_TENANT)


@dataclass(slots=True, eq=False, kw_only=True)
class Underway(Entry):
    """One request. `tokens` are those of its answer that earlier attempts generated.

    Attributes:
        request_id: of this attempt; workers know no other.
        dispatches: attempts since admission let it through last.
        attempt_tokens: of its answer that this attempt has generated, when it was last looked.
        on_recount: makes its costs those of what is left.
        receiving: decode has blocks for the prompt; received: it is known when they will have come.
    """

    journey: Journey
    frontend: SimulatedFrontend
    on_recount: Callable[[Underway], None] | None = None
    request_id: str = ""
    attempts: int = 0
    dispatches: int = 0
    attempt_tokens: int = 0
    prefill: SimulatedWorker | None = None
    decode: SimulatedWorker | None = None
    prefill_share: Share | None = None
    decode_share: Share | None = None
    source: SimulatedWorker | None = None
    source_tokens: int = 0
    receiving: bool = False
    received: bool = False

    @property
    def model(self) -> str:
        return self.frontend.model

    @property
    def left_tokens(self) -> int:
        """Of the answer, that are still to be generated."""
        return self.journey.arrival.output_tokens - self.tokens

    @property
    def prompt_tokens(self) -> int:
        """Of this attempt: the prompt, and what earlier attempts generated."""
        return self.journey.arrival.input_tokens + self.tokens

    def key(self) -> int:
        return xxh3_64_intdigest(self.journey.arrival.request_id.encode())

    def recount(self) -> None:
        if self.on_recount is not None:
            self.on_recount(self)

    def request(self, max_tokens: int, *, receives: bool) -> Request:
        """As a worker's scheduler takes it."""
        keys = list(self.journey.arrival.keys)
        return Request(self.request_id, self.prompt_tokens, max_tokens, keys, receives=receives)

    def forget_workers(self) -> None:
        """It is with no worker any more."""
        self.prefill = self.decode = self.source = None
        self.prefill_share = self.decode_share = None
        self.receiving = self.received = False
