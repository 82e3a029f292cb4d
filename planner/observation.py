"""What a planner sees at one moment: the workers, and what came, waited and was answered since the last look.

Plain data. The live planner fills it from the registry and the frontends' reports, the simulator from virtual time;
every scaling policy, ours and the baselines, reads nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slipstream.latency_counts import LatencyCounts
from slipstream.v1.registry_pb2 import Role, WorkerState


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """One worker.

    Attributes:
        gpus: that it occupies; 1 for a worker on a CPU.
        since_s: the clock's time since which it has this state and role.
        waiting_tokens: prompt tokens accepted and not yet computed.
        context_tokens: tokens of the sequences that it generates for.
        start_s: what its start took, by its own clock; 0 where it has not told.
        prefill_busy, decode_busy: shares of the interval in which it computed prompts, and in which it generated.
    """

    worker_id: str
    model: str
    role: Role.ValueType
    state: WorkerState.ValueType
    since_s: float
    gpus: int = 1
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    context_tokens: int = 0
    blocks_used: int = 0
    blocks: int = 0
    start_s: float = 0.0
    prefill_busy: float = 0.0
    decode_busy: float = 0.0

    @property
    def kv_use(self) -> float:
        """Share of its KV blocks that requests hold."""
        return self.blocks_used / self.blocks if self.blocks else 0.0


@dataclass(slots=True)
class Traffic:
    """One model's requests of one priority class in one interval.

    Attributes:
        arrivals: taken in, also those that wait since; refused: sent away (429), not in `arrivals`.
        input_tokens, cached_tokens: of the arrivals' prompts, and what of these no worker had to compute, of those
            prompts that were computed in the interval.
        finished, output_tokens: requests answered to their end, and their tokens.
        ttft, itl: of requests whose first token came, and of those that finished (the mean over one answer).
        queued, queued_tokens: that wait in the frontends now, and their prompt tokens.
        oldest_wait_s: how long the first of them has waited.
    """

    arrivals: int = 0
    refused: int = 0
    failed: int = 0
    input_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_tokens: int = 0
    finished: int = 0
    output_tokens: int = 0
    ttft: LatencyCounts = field(default_factory=LatencyCounts)
    itl: LatencyCounts = field(default_factory=LatencyCounts)
    queued: int = 0
    queued_tokens: int = 0
    oldest_wait_s: float = 0.0

    def merge(self, other: Traffic) -> None:
        """Take another frontend's part of the same interval in."""
        self.arrivals += other.arrivals
        self.refused += other.refused
        self.failed += other.failed
        self.input_tokens += other.input_tokens
        self.computed_prompt_tokens += other.computed_prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.finished += other.finished
        self.output_tokens += other.output_tokens
        self.ttft.merge(other.ttft)
        self.itl.merge(other.itl)
        self.queued += other.queued
        self.queued_tokens += other.queued_tokens
        self.oldest_wait_s = max(self.oldest_wait_s, other.oldest_wait_s)

    @property
    def mean_input_tokens(self) -> float:
        """0 where nothing arrived."""
        return self.input_tokens / self.arrivals if self.arrivals else 0.0

    @property
    def mean_output_tokens(self) -> float:
        """0 where nothing finished."""
        return self.output_tokens / self.finished if self.finished else 0.0

    @property
    def hit_rate(self) -> float:
        """Of the prompt tokens of this interval, those that no worker had to compute."""
        whole = self.computed_prompt_tokens + self.cached_tokens
        return self.cached_tokens / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at everything.

    Attributes:
        at_s: of a clock that never goes backwards.
        unix_s: the same moment for people and for daily seasons; the simulator sets it from the trace.
        interval_s: since the last look; what `traffic` counts fell into it.
        traffic: by model and priority class (`realtime`, `nearline`, `batch`); absent where nothing happened or waits.
        complete: False while some frontend or worker may not have been heard yet (just after a start): no time to act.
    """

    at_s: float
    unix_s: float
    interval_s: float
    workers: tuple[WorkerSeen, ...]
    traffic: Mapping[tuple[str, str], Traffic]
    complete: bool = True
