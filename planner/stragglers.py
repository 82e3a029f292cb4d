"""Which workers fall behind their peers: slower at the same work than the others of their kind, and for long.

What is compared is not time but factors: what frontends saw over what the worker's profile says of that batch, context
or prompt, so that a worker with more to do is not taken for a slow one. Median and MAD over the peers (Hampel's
identifier) say what is usual, so that one bad worker does not hide another. Pure: the time is passed in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median

from slipstream.v1.planner_pb2 import WorkerSpeed
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState
from slipstream.worker_settings import HealthSettings

FRESH_S = 30.0
"""What was seen longer ago says nothing of now."""
FORGET_S = 600.0
"""A slow worker of which nothing is seen any more (it is fenced, or nobody chooses it) is given another chance then."""
PEERS = 2
"""Others that must have been seen: of two workers nobody knows which is the odd one."""
DEVIATIONS = 3.0
LEAST_SPREAD = 0.05
"""Of logarithms: peers that are all alike are no reason to call 5% slow."""
MOST_WORKERS, MOST_SPEEDS, MOST_FRONTENDS = 8192, 4096, 256
MAX_NAME_CHARS = 256
_NORMAL = 1.4826


@dataclass(slots=True)
class _Seen:
    """By frontend: when, and the factors of steps and prompts."""

    by_frontend: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    slow_since_s: float | None = None
    slow_seen_s: float = 0.0
    ratio: float = 1.0


class SpeedBook:
    """What frontends saw of each worker's speed."""

    def __init__(self, limits: HealthSettings) -> None:
        self._limits = limits
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._slow: dict[str, str] = {}

    @property
    def slow(self) -> dict[str, str]:
        """By worker, in words; as of the last `judge`."""
        return self._slow

    def ratios(self) -> dict[str, float]:
        """By worker, over the median of its peers; as of the last `judge`."""
        return {name: seen.ratio for (name, _), seen in self._seen.items()}

    def take(self, frontend_id: str, speeds: Iterable[WorkerSpeed], now_s: float) -> None:
        """A frontend's report. What is out of all bounds is left out."""
        if len(frontend_id) > MAX_NAME_CHARS:
            return
        for one in islice(speeds, MOST_SPEEDS):
            key = one.worker_id, one.epoch
            seen = self._seen.get(key)
            if seen is None:
                if len(self._seen) >= MOST_WORKERS:
                    continue
                seen = self._seen[key] = _Seen()
            if len(seen.by_frontend) >= MOST_FRONTENDS and frontend_id not in seen.by_frontend:
                continue
            if one.samples and _is_factor(one.step_factor) and _is_factor(one.prompt_factor):
                seen.by_frontend[frontend_id] = now_s, one.step_factor, one.prompt_factor

    def judge(self, records: Sequence[WorkerRecord], now_s: float) -> dict[str, str]:
        """The workers that are slow now, each with what is to be said of it. Call it every few seconds."""
        there = {(one.worker_id, one.epoch): one for one in records}
        self._seen = {key: seen for key, seen in self._seen.items() if key in there}
        pools: dict[tuple[str, Role.ValueType, str], dict[tuple[str, int], float]] = defaultdict(dict)
        for key, seen in self._seen.items():
            record, factor = there[key], self._factor(seen, there[key].role, now_s)
            if factor is not None and record.state in (WorkerState.READY, WorkerState.FENCED):
                pools[record.model, record.role, record.device][key] = factor
        for pool in pools.values():
            for key in pool:
                self._compare(key, pool, now_s)
        self._slow = {name: self._text(seen) for (name, _), seen in self._seen.items() if self._lasts(seen, now_s)}
        return self._slow

    def _factor(self, seen: _Seen, role: Role.ValueType, now_s: float) -> float | None:
        """The mean of what the frontends saw lately, of what its role is for; None: nothing."""
        place = 1 if role == Role.ROLE_DECODE else 2
        seen.by_frontend = {name: one for name, one in seen.by_frontend.items() if now_s - one[0] < FRESH_S}
        logs = [math.log(one[place]) for one in seen.by_frontend.values() if one[place] > 0]
        return sum(logs) / len(logs) if logs else None

    def _compare(self, key: tuple[str, int], pool: dict[tuple[str, int], float], now_s: float) -> None:
        seen, others = self._seen[key], [factor for other, factor in pool.items() if other != key]
        if len(others) < PEERS:
            seen.slow_since_s = None
            return
        usual = median(others)
        spread = max(LEAST_SPREAD, _NORMAL * median(abs(one - usual) for one in others))
        behind = pool[key] - usual
        seen.ratio = math.exp(behind)
        if behind > max(math.log(self._limits.slow_factor), DEVIATIONS * spread):
            seen.slow_since_s = now_s if seen.slow_since_s is None else seen.slow_since_s
            seen.slow_seen_s = now_s
        else:
            seen.slow_since_s = None

    def _lasts(self, seen: _Seen, now_s: float) -> bool:
        if seen.slow_since_s is None:
            return False
        if now_s - seen.slow_seen_s >= FORGET_S:
            seen.slow_since_s = None
            return False
        return seen.slow_seen_s - seen.slow_since_s >= self._limits.slow_for_s

    def _text(self, seen: _Seen) -> str:
        return f"it takes {seen.ratio:.1f} times as long as its peers for the same work (health.slow_factor)"


def _is_factor(value: float) -> bool:
    return math.isfinite(value) and 0.0 <= value <= 1e6
