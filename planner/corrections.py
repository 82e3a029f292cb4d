"""What live workers teach about their profile: factors on its times, bounded and slow, forgotten when nothing comes.

Only settled workers teach. One that has just started, or has just changed its role, compiles, allocates and has an
empty cache: what is seen then would make the model believe for long that all workers are slow (Dynamo's issue 12430).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.capacity import Corrections, DecodeBatch, Pair, PrefillQueue
from planner.demand import Demand
from planner.observation import Traffic, WorkerSeen
from slipstream.v1.registry_pb2 import Role, WorkerState

SETTLING_S = 30.0
"""What a worker computes in so long after a start or a flip is not believed."""
LEAST, MOST = 0.5, 3.0
LESSON_REQUESTS = 500.0
FORGET_S = 3600.0
UNSURE = 0.1
"""A factor's logarithm below which it is not applied: profiles and formulas are not better than that."""
QUIET_USE = 0.4
"""Below this use the wait in the queue is small, and a time to first token is mostly compute."""


class Learner:
    """Factors for one model's two roles."""

    __slots__ = ("_context", "_decode", "_members", "_prefill", "_running", "lessons", "pair")

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.lessons = 0
        self._prefill = self._decode = 0.0  # logarithms
        self._members: frozenset[tuple[str, int]] = frozenset()
        self._running = self._context = 0.0

    @property
    def corrections(self) -> Corrections:
        return Corrections(_sure(self._prefill), _sure(self._decode))

    def learn(
        self, workers: Sequence[WorkerSeen], traffic: Traffic, demand: Demand, at_s: float, interval_s: float
    ) -> None:
        """Take one interval in: all classes of the model together."""
        keep = math.exp(-interval_s / FORGET_S)
        self._prefill *= keep
        self._decode *= keep
        members = frozenset((one.worker_id, int(one.role)) for one in workers if one.state == WorkerState.READY)
        same, self._members = members == self._members, members
        settled_before_s = at_s - interval_s - SETTLING_S
        settled = all(one.since_s <= settled_before_s for one in workers if one.state == WorkerState.READY)
        decode = _ready(workers, Role.ROLE_DECODE)
        running = sum(one.running for one in decode)
        context = sum(one.context_tokens for one in decode)
        mix = 1.0 - math.exp(-interval_s / 20.0) if same and self._running else 1.0
        self._running += mix * (running - self._running)
        self._context += mix * (context - self._context)
        if not same or not settled or not members:
            return
        self._learn_decode(len(decode), traffic)
        self._learn_prefill(_ready(workers, Role.ROLE_PREFILL), decode, traffic, demand, interval_s)

    def _learn_decode(self, workers: int, traffic: Traffic) -> None:
        seen = len(traffic.itl)
        if not seen or not workers or self._running < 0.5:
            return
        batch = max(1.0, self._running / workers)
        expected_s = self.pair.decode.decode_s(batch, self._context / self._running if self._context else 1.0)
        self._decode = _moved(self._decode, traffic.itl.mean_s / expected_s, seen)
        self.lessons += seen

    def _learn_prefill(
        self,
        prefill: Sequence[WorkerSeen],
        decode: Sequence[WorkerSeen],
        traffic: Traffic,
        demand: Demand,
        interval_s: float,
    ) -> None:
        if not prefill or demand.requests_per_s <= 0.0:
            return
        queue = PrefillQueue(demand, self.pair.prefill)
        new_tokens = demand.input_tokens * (1.0 - demand.hit_rate)
        if all(one.waiting > 0 for one in prefill):
            # All had more to do than they could: what they computed is what they can.
            expected_s = traffic.computed_prompt_tokens / max(1.0, new_tokens) * queue.mean_s
            seen = traffic.computed_prompt_tokens / max(1.0, demand.input_tokens)
            if expected_s > 0.0 and seen >= 1.0:
                self._prefill = _moved(self._prefill, len(prefill) * interval_s / expected_s, seen)
            return
        seen = len(traffic.ttft)
        factor = math.exp(self._prefill)
        if not seen or traffic.queued or queue.offered * factor > QUIET_USE * len(prefill):
            return
        profile = self.pair.prefill.profile
        chance, wait_s = PrefillQueue(demand, self.pair.prefill, correction=factor).waits(len(prefill))
        per_token = profile.block_bytes / profile.block_tokens
        travel_s = self.pair.prefill.transfer_s(min(new_tokens, profile.step_tokens) * per_token)
        batch = DecodeBatch(demand, self.pair.decode).step_s(max(1.0, self._running / max(1, len(decode))))
        computed_s = traffic.ttft.mean_s - profile.overhead_s - travel_s - batch - chance * wait_s
        if computed_s > 0.0 and queue.mean_s > 0.0:
            self._prefill = _moved(self._prefill, computed_s / queue.mean_s, seen)
            self.lessons += seen


def _ready(workers: Sequence[WorkerSeen], role: Role.ValueType) -> list[WorkerSeen]:
    return [one for one in workers if one.role == role and one.state == WorkerState.READY]


def _sure(logarithm: float) -> float:
    return math.exp(math.copysign(max(0.0, abs(logarithm) - UNSURE), logarithm))


def _moved(logarithm: float, ratio: float, seen: float) -> float:
    """A step towards what was seen, the larger the more requests said it, within the bounds."""
    wanted = math.log(min(max(ratio, LEAST), MOST))
    return logarithm + (1.0 - math.exp(-seen / LESSON_REQUESTS)) * (wanted - logarithm)
