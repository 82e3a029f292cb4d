"""What becomes of fenced workers: another one is started in their place, and then they are ended. Pure.

Little is remembered that could not be seen again: a worker that the scaler started since another one was fenced, in
the same pool, is its replacement, whoever asked for it. So a planner that takes over starts none twice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from planner.scaling import Drain, Start
from slipstream.scaler import ScaledWorker, SickWorker
from slipstream.v1.registry_pb2 import HealthState, Role, WorkerRecord, WorkerState
from slipstream.worker_settings import HealthSettings

RETRY_S = 10.0
HOUR_S = 3600.0
OWED_FOR_S = 900.0
"""How long a replacement is tried for whose worker had to be ended first."""
CLOCK_S = 1.0
"""A worker's and a scaler's word of the time, rounded and apart."""

DEVICE_CODES = ("gpu_", "ecc_", "remap_", "pages_", "xid", "nvlink_", "pcie_", "throttled", "nvml_")
"""Reasons that are the device's own, and not of a worker's process, of its node, or somebody's word."""

Pool = tuple[str, Role.ValueType]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to be done now.

    Attributes:
        sick: for which worker; None: for one that is gone already.
        owes: of a drain: nothing was started for it yet.
    """

    action: Start | Drain
    sick: WorkerRecord | None
    owes: bool = False


@dataclass(slots=True)
class _Owed:
    pool: Pool
    since_s: float
    tried_s: float


@dataclass(slots=True)
class Replacements:
    """Decides each interval; the time is passed in.

    Attributes:
        owed: replacements for workers that were ended first, because there was no room for both.
    """

    limits: HealthSettings
    _paired: dict[str, str] = field(default_factory=dict)
    _no_room: dict[str, float] = field(default_factory=dict)
    _tried: dict[str, float] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _others_end: dict[Pool, float] = field(default_factory=dict)
    _drained: set[tuple[str, int]] = field(default_factory=set)
    _started: list[float] = field(default_factory=list)
    _since: dict[tuple[str, int], float] = field(default_factory=dict)
    owed: list[_Owed] = field(default_factory=list)

    def steps(
        self, records: Sequence[WorkerRecord], scaled: Sequence[ScaledWorker], now_s: float, unix_s: float
    ) -> list[Step]:
        """What to do now for the workers that are to be replaced; try it, and say what came of it."""
        by_id, own = {one.worker_id: one for one in records}, {one.worker_id: one for one in scaled}
        wanted = [one for one in wanting(records) if one.worker_id in own and not own[one.worker_id].ending]
        self._others_end = {pool: at_s for pool, at_s in self._others_end.items() if now_s - at_s < HOUR_S}
        # Where what runs them ends another one than is meant, replacing would only take well ones away.
        wanted = [one for one in wanted if (one.model, one.role) not in self._others_end]
        self._forget(wanted, now_s)
        ill = {one.worker_id for one in records if _is_ill(one)}
        self._paired = {name: other for name, other in self._paired.items() if name in ill}
        self._taken &= own.keys()
        matches = replacements(wanted, scaled, self._paired, self._taken)
        left = self._starts_left(now_s)
        steps = []
        for sick in wanted:
            match, name = matches.get(sick.worker_id), sick.worker_id
            there = match is not None and match in by_id and by_id[match].state == WorkerState.READY
            waited_s = now_s - self._since.setdefault((name, sick.epoch), now_s)
            alone = sick.state != WorkerState.FENCED
            late = waited_s >= self.limits.replacement_timeout_s and not alone
            if there or late or (name in self._no_room and not alone):
                if (name, sick.epoch) not in self._drained:
                    steps.append(Step(Drain(name), sick, owes=match is None))
            elif match is None and now_s - self._tried.get(name, -math.inf) >= RETRY_S and left > 0:
                left -= 1
                self._tried[name] = now_s
                steps.append(Step(Start(sick.model, sick.role), sick))
        for one in self.owed:
            if now_s - one.tried_s >= RETRY_S and left > 0:
                left -= 1
                one.tried_s = now_s
                steps.append(Step(Start(*one.pool), None))
        return steps

    def leaving(self, records: Sequence[WorkerRecord]) -> frozenset[str]:
        """Those in whose place another one is coming, whatever they do until then."""
        return frozenset(one.worker_id for one in records if one.worker_id in self._paired)

    def done(self, step: Step, worker_id: str, now_s: float) -> None:
        """A step was carried out; `worker_id`: which was started, or ends."""
        if isinstance(step.action, Start):
            self._started.append(now_s)
            pool = step.action.model, step.action.role
            if step.sick is None:
                self.owed.remove(next(one for one in self.owed if one.pool == pool))
                self._taken.add(worker_id)
            else:
                self._paired[step.sick.worker_id] = worker_id
            return
        sick = step.sick
        assert sick is not None, "only a worker that is there is ended"
        if worker_id != sick.worker_id:
            self._others_end[sick.model, sick.role] = now_s
        self._drained.add((sick.worker_id, sick.epoch))
        self._no_room.pop(sick.worker_id, None)
        if step.owes:
            self.owed.append(_Owed((sick.model, sick.role), now_s, now_s))

    def failed(self, step: Step, now_s: float) -> None:
        """There was no room for another one: the sick one makes room, where it has peers."""
        if isinstance(step.action, Start) and step.sick is not None:
            self._no_room[step.sick.worker_id] = now_s

    def _starts_left(self, now_s: float) -> int:
        """As many as may be fenced within an hour may be replaced."""
        self._started = [at_s for at_s in self._started if now_s - at_s < HOUR_S]
        return self.limits.replacements_per_hour - len(self._started)

    def _forget(self, wanted: Sequence[WorkerRecord], now_s: float) -> None:
        names, keys = {one.worker_id for one in wanted}, {(one.worker_id, one.epoch) for one in wanted}
        self._no_room = {name: at_s for name, at_s in self._no_room.items() if name in names}
        self._tried = {name: at_s for name, at_s in self._tried.items() if name in names}
        self._since = {key: at_s for key, at_s in self._since.items() if key in keys}
        self._drained &= keys
        self.owed = [one for one in self.owed if now_s - one.since_s < OWED_FOR_S]


def wanting(records: Sequence[WorkerRecord]) -> list[WorkerRecord]:
    """Workers that are to be replaced: the fenced ones, and sick ones that only the want of a healthy peer keeps in
    service. The longest sick first."""
    healthy = {(one.model, one.role) for one in records if _is_healthy(one)}
    found = [
        one
        for one in records
        if one.state == WorkerState.FENCED
        or (
            one.state == WorkerState.READY
            and one.health.state == HealthState.SICK
            and (one.model, one.role) not in healthy
        )
    ]
    return sorted(found, key=lambda one: (_since_unix_s(one), one.worker_id))


def replacements(
    sick: Sequence[WorkerRecord], scaled: Sequence[ScaledWorker], paired: Mapping[str, str], taken: Set[str]
) -> Mapping[str, str]:
    """By sick worker, the one that was started in its place: the first in its pool that was started since.

    Args:
        paired: those of which it is known, as far as they are still there.
        taken: workers that were started in the place of others, which are gone.
    """
    started: dict[Pool, list[ScaledWorker]] = defaultdict(list)
    there = {one.worker_id for one in scaled if not one.ending}
    found = {name: other for name, other in paired.items() if other in there}
    no_match = {one.worker_id for one in sick} | set(found.values()) | taken
    for one in sorted(scaled, key=lambda one: (one.started_s, one.worker_id)):
        if not one.ending and one.worker_id not in no_match:
            started[one.model, one.role].append(one)
    for record in (one for one in sick if one.worker_id not in found):
        waiting = started[record.model, record.role]
        later = [one for one in waiting if one.started_s >= _since_unix_s(record) - CLOCK_S]
        if later:
            found[record.worker_id] = later[0].worker_id
            waiting.remove(later[0])
    return found


def sick_worker(record: WorkerRecord) -> SickWorker:
    """As whoever owns its machine hears of it."""
    health = record.health
    reasons = [one for one in health.reasons if one.state == HealthState.SICK]
    return SickWorker(
        record.worker_id,
        record.node,
        tuple(health.device_ids),
        any(one.code.startswith(DEVICE_CODES) for one in reasons),
        tuple(one.text for one in reasons) or (health.fenced_because,),
    )


def _is_ill(record: WorkerRecord) -> bool:
    return record.state == WorkerState.FENCED or record.health.state == HealthState.SICK


def _is_healthy(record: WorkerRecord) -> bool:
    return record.state == WorkerState.READY and record.health.state != HealthState.SICK


def _since_unix_s(record: WorkerRecord) -> int:
    return record.health.fenced_unix_s or record.health.since_unix_s
