"""A cluster in closed form, for tests of scaling policies: prompts' work is a fluid, batches follow Little's law.

Far coarser than the simulator, and so quick that a test can let it run for hours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from planner.observation import Observation, Traffic, WorkerSeen
from planner.scaling import Counts, Decision, Drain, Flip, ScalingPolicy, Start
from slipstream.performance import Predictor, Profile, read_profile
from slipstream.v1.registry_pb2 import Role, WorkerState

PROFILES = Path(__file__).parents[3] / "engine" / "simulated" / "profiles"
PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE
READY, STARTING, DRAINING = WorkerState.READY, WorkerState.STARTING, WorkerState.DRAINING


def packaged(name: str = "qwen3-32b-h100-tp1") -> Profile:
    """One of the shipped profiles."""
    return read_profile(PROFILES / f"{name}.json")


def worker(worker_id: str, role: Role.ValueType, **fields: object) -> WorkerSeen:
    """One that is ready and idle, for ever."""
    base = WorkerSeen(worker_id, "m", role, READY, since_s=-1e6)
    return replace(base, **fields)  # type: ignore[arg-type]


def pool(prefill: int, decode: int) -> tuple[WorkerSeen, ...]:
    """So many idle workers."""
    return (
        *(worker(f"p{number}", PREFILL) for number in range(prefill)),
        *(worker(f"d{number}", DECODE) for number in range(decode)),
    )


@dataclass
class Plant:
    """One model `m`, class `realtime`.

    Attributes:
        rate: requests per second at a time.
        slowness: of the workers, over their profile's times; cold_slowness: for 30 s after a start.
    """

    profile: Profile
    rate: Callable[[float], float]
    counts: Counts
    input_tokens: float = 2000.0
    variation: float = 1.0
    output_tokens: float = 200.0
    interval_s: float = 5.0
    start_s: float = 60.0
    slowness: float = 1.0
    cold_slowness: float = 1.0
    seed: int = 1
    at_s: float = 0.0
    backlog_tokens: float = 0.0
    decisions: list[Decision] = field(default_factory=list)
    history: list[tuple[float, Counts]] = field(default_factory=list)
    ttft: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workers = {one.worker_id: one for one in pool(self.counts.prefill, self.counts.decode)}
        self._random = random.Random(self.seed)
        self._predictor = Predictor(self.profile)
        self._number = 0

    def run(self, policy: ScalingPolicy, seconds: float) -> None:
        """Let the policy act on it for so long."""
        end_s = self.at_s + seconds
        while self.at_s < end_s:
            decision = policy.decide(self.step())
            self.decisions.append(decision)
            self.apply(decision)
            self.history.append((self.at_s, self.now))

    @property
    def now(self) -> Counts:
        """Workers that are not ending."""
        alive = [one for one in self.workers.values() if one.state != DRAINING]
        prefill = sum(1 for one in alive if one.role == PREFILL)
        return Counts(prefill, len(alive) - prefill)

    @property
    def changes(self) -> int:
        """Actions so far."""
        return sum(len(decision.actions) for decision in self.decisions)

    def apply(self, decision: Decision) -> None:
        """Do what was decided; an action on a worker that is not there is an error."""
        for action in decision.actions:
            if isinstance(action, Start):
                self._number += 1
                worker_id = f"new{self._number}"
                self.workers[worker_id] = WorkerSeen(worker_id, "m", action.role, STARTING, self.at_s)
            elif isinstance(action, Flip):
                one = self.workers[action.worker_id]
                assert one.state == READY, f"{one} cannot be flipped"
                assert one.role != action.role, f"{one} has that role"
                self.workers[action.worker_id] = replace(one, role=action.role, since_s=self.at_s)
            else:
                assert isinstance(action, Drain)
                one = self.workers[action.worker_id]
                assert one.state != DRAINING, f"{one} drains already"
                self.workers[action.worker_id] = replace(one, state=DRAINING, since_s=self.at_s)

    def step(self) -> Observation:
        """The next interval."""
        self.at_s += self.interval_s
        for one in list(self.workers.values()):
            if one.state == DRAINING and self.at_s - one.since_s >= 2 * self.interval_s:
                del self.workers[one.worker_id]
            elif one.state == STARTING and self.at_s - one.since_s >= self.start_s:
                self.workers[one.worker_id] = replace(one, state=READY, since_s=self.at_s)
        traffic = self._serve(self._arrivals())
        return Observation(
            self.at_s, self.at_s, self.interval_s, tuple(self.workers.values()), {("m", "realtime"): traffic}
        )

    def _arrivals(self) -> list[float]:
        left_s, lengths = self.interval_s, []
        rate = self.rate(self.at_s)
        spread = math.sqrt(math.log1p(self.variation**2))
        while rate > 0.0 and (left_s := left_s - self._random.expovariate(rate)) > 0.0:
            lengths.append(self.input_tokens * math.exp(self._random.gauss(0.0, spread) - spread * spread / 2.0))
        return lengths

    def _serve(self, lengths: list[float]) -> Traffic:
        prefill = [one for one in self.workers.values() if one.role == PREFILL and one.state == READY]
        decode = [one for one in self.workers.values() if one.role == DECODE and one.state == READY]
        mean_s = self._predictor.prefill_s(self.input_tokens) * self._slow(prefill)
        tokens_per_s = len(prefill) * self.input_tokens / mean_s
        whole = self.backlog_tokens + sum(lengths)
        computed = min(whole, tokens_per_s * self.interval_s)
        self.backlog_tokens = whole - computed
        traffic = Traffic(len(lengths), input_tokens=int(sum(lengths)), computed_prompt_tokens=int(computed))
        traffic.finished, traffic.output_tokens = len(lengths), int(len(lengths) * self.output_tokens)
        wait_s = self.backlog_tokens / tokens_per_s if prefill else 3600.0
        context = self.input_tokens + self.output_tokens / 2.0
        step_s, batch = 0.0, 1.0
        for _ in range(8):
            step_s = self._predictor.decode_s(batch, context) * self._slow(decode)
            batch = max(1.0, len(lengths) / self.interval_s * self.output_tokens * step_s / max(1, len(decode)))
        for length in lengths:
            ttft_s = wait_s + step_s + self._predictor.prefill_s(length) * self._slow(prefill)
            traffic.ttft.add(ttft_s)
            self.ttft.append((self.at_s, ttft_s))
        if lengths:
            traffic.itl.add(step_s, len(lengths))
        for one in prefill:
            waiting = int(self.backlog_tokens / len(prefill))
            self.workers[one.worker_id] = replace(one, waiting_tokens=waiting, waiting=int(waiting > 0))
        for one in decode:
            running = round(batch) if lengths else 0
            self.workers[one.worker_id] = replace(one, running=running, context_tokens=int(running * context))
        return traffic

    def _slow(self, workers: list[WorkerSeen]) -> float:
        if not workers:
            return 1.0
        cold = sum(1 for one in workers if 0.0 <= self.at_s - one.since_s < 30.0 and one.since_s > 0.0)
        return self.slowness * (1.0 + (self.cold_slowness - 1.0) * cold / len(workers))
