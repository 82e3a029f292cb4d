"""From findings over time to one of three words: healthy, suspect, sick. Pure: the time is passed in.

A finding counts once it has lasted for its own `hold_s`, and goes on counting for a while after it was seen last, so
that what flickers neither alarms nor calms anybody. Some last for good: a GPU that fell off the bus is not well again
because one question to it happened to be answered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.health.findings import Finding
from slipstream.v1.registry_pb2 import HealthState


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a worker is.

    Attributes:
        reasons: the gravest first; none where it is healthy.
        since_s: when the state began.
    """

    state: HealthState.ValueType
    reasons: tuple[Finding, ...]
    since_s: float


@dataclass(slots=True)
class _Kept:
    finding: Finding
    first_s: float
    last_s: float
    counts: bool = False


@dataclass(slots=True)
class HealthPolicy:
    """What has been found of one worker.

    Attributes:
        clear_s: how long something must not have been seen before it does not count any more.
    """

    clear_s: float
    _kept: dict[tuple[str, str], _Kept] = field(default_factory=dict)
    _verdict: Verdict | None = None

    def judge(self, findings: Iterable[Finding], now_s: float) -> Verdict:
        """What was found now; call it in order of time, also when nothing was."""
        seen = {(one.code, one.place): one for one in findings}
        for key, finding in seen.items():
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = _Kept(finding, now_s, now_s)
            kept.finding, kept.last_s = finding, now_s
            kept.counts = kept.counts or now_s - kept.first_s >= finding.hold_s
        for key in self._kept.keys() - seen.keys():
            kept = self._kept[key]
            keep_s = self.clear_s if kept.finding.keep_s is None else kept.finding.keep_s
            if not kept.counts or now_s - kept.last_s >= keep_s:
                del self._kept[key]
        reasons = sorted(
            (kept.finding for kept in self._kept.values() if kept.counts),
            key=lambda one: (-one.state, one.code, one.place),
        )
        state = reasons[0].state if reasons else HealthState.HEALTHY
        before = self._verdict
        since_s = before.since_s if before is not None and before.state == state else now_s
        self._verdict = Verdict(state, tuple(reasons), since_s)
        return self._verdict
