"""What a request claims: its priority class, whose it is, and how long it may take. And how it stands in a queue."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

DEFAULT_TENANT = "default"


class Priority(IntEnum):
    """Smaller goes first."""

    REALTIME = 0
    NEARLINE = 1
    BATCH = 2

    @property
    def label(self) -> str:
        """As clients and metrics write it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Claim:
    """What the client is entitled to, whichever face it came in by.

    Attributes:
        weight: the tenant's share of a contended cluster is in proportion to it.
        timeout_s: longest the whole request may take; None: up to `frontend.request_timeout_s`.
        prefix: what a global frontend with a valid key calls the prompt's beginnings (`frontend.prefix_names`).
    """

    priority: Priority = Priority.REALTIME
    tenant: str = DEFAULT_TENANT
    weight: float = 1.0
    timeout_s: float | None = None
    prefix: str = ""


DEFAULT_CLAIM = Claim()


class Stage(Enum):
    """Where an entry is. It moves down, or from IN_FLIGHT back to QUEUED when it is preempted."""

    NEW = "new"
    QUEUED = "queued"
    PREFILL = "prefill"  # with the workers, its prompt is not yet computed
    DECODE = "decode"  # with the workers, its prompt is computed
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Entry:
    """One request as the scheduler sees it; compared by identity.

    Attributes:
        work: of the whole request, in tokens' worth of a worker's time (see `demand`); what tenants share.
        prompt_work: of its prompt alone.
        kv_tokens: tokens that it is expected to hold in the KV cache.
        arrived_s, deadline_s: the clock's time.
        queued_s: since when it has been in the queue it is in.
        sent_s: when it went to the workers.
        tokens: generated so far.
        preemptions: times it was sent back into the queue.
    """

    claim: Claim
    work: float
    prompt_work: float
    kv_tokens: float
    arrived_s: float
    deadline_s: float
    queued_s: float = 0.0
    sent_s: float = 0.0
    tokens: int = 0
    preemptions: int = 0
    stage: Stage = Stage.NEW

    @property
    def pausable(self) -> bool:
        """Whether it can be taken from the workers now and go on later as if nothing had been."""
        return True

    def key(self) -> int:
        """The same for the same request when its client comes back with it."""
        return id(self)

    def recount(self) -> None:
        """It was taken from the workers: its costs are those of what is left."""
