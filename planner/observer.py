"""Makes the planner's observations of what the registry posts, what frontends report and what the scaler runs.

Plain data with the time passed in. Between two looks it is shown the registry's set again and again: a worker's share
of busy time is that of the sets in which it had something to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from planner.observation import Observation, Traffic, WorkerSeen
from slipstream.scaler import ScaledWorker
from slipstream.v1.registry_pb2 import WorkerRecord, WorkerSet, WorkerState


@dataclass(slots=True)
class _Busy:
    """Of one worker since the last look, in sets that were shown."""

    sets: int = 0
    prefill: int = 0
    decode: int = 0


class Observer:
    """Remembers of each worker since when it is what it is, and how busy it was since the last look."""

    def __init__(self, now_s: float) -> None:
        self._looked_s = now_s
        self._has_looked = False
        self._began: dict[str, float] = {}
        self._since: dict[str, tuple[tuple[int, int, int], float]] = {}
        self._busy: dict[str, _Busy] = {}

    def note(self, records: Iterable[WorkerRecord]) -> None:
        """What the registry posts now."""
        for record in records:
            busy = self._busy.setdefault(record.worker_id, _Busy())
            busy.sets += 1
            busy.prefill += record.load.waiting_tokens > 0
            busy.decode += record.load.context_tokens > 0

    def look(
        self,
        posted: WorkerSet,
        scaled: Sequence[ScaledWorker],
        traffic: Mapping[tuple[str, str], Traffic],
        *,
        now_s: float,
        unix_s: float,
        complete: bool,
        leaving: Set[str] = frozenset(),
    ) -> Observation:
        """Everything as it is now.

        Args:
            scaled: what the scaler runs. Those that have not registered yet are starting, and those that were asked to
                end are draining, whatever the registry has heard of it.
            traffic: since the last look.
            leaving: workers that others are to replace: whatever they say, they are on their way out.
            complete: whether every frontend was heard; of the workers the registry says it.
        """
        workers = {record.worker_id: self._seen(record, now_s) for record in posted.workers}
        self._began = {
            one.worker_id: self._began_s(one, now_s, unix_s) for one in scaled if one.worker_id not in workers
        }
        for one in scaled:
            known = workers.get(one.worker_id)
            if known is None:
                state = WorkerState.DRAINING if one.ending else WorkerState.STARTING
                since_s = self._began[one.worker_id]
                workers[one.worker_id] = WorkerSeen(one.worker_id, one.model, one.role, state, since_s)
            elif one.ending and known.state != WorkerState.DRAINING:
                workers[one.worker_id] = replace(known, state=WorkerState.DRAINING)
        for name, seen in workers.items():
            # Fenced: it finishes what it has and takes nothing new, as one that drains does.
            if seen.state == WorkerState.FENCED or (name in leaving and seen.state == WorkerState.READY):
                workers[name] = replace(seen, state=WorkerState.DRAINING)
        self._since = {name: since for name, since in self._since.items() if name in workers}
        self._busy.clear()
        self._has_looked = True
        interval_s, self._looked_s = now_s - self._looked_s, now_s
        return Observation(
            at_s=now_s,
            unix_s=unix_s,
            interval_s=interval_s,
            workers=tuple(workers[name] for name in sorted(workers)),
            traffic=dict(traffic),
            complete=complete and posted.settled,
        )

    def _began_s(self, one: ScaledWorker, now_s: float, unix_s: float) -> float:
        """Since when a worker that has not registered is starting, by this process' clock.

        The scaler's stamp is of a wall clock, which may jump or be another machine's, and of a worker that lost its
        registration it is long past. So it is read once, and only one that was there at the first look may have
        begun before the look before: else one jump would teach the policy that starts take hours.
        """
        known = self._began.get(one.worker_id)
        if known is not None:
            return known
        age_s = max(0.0, unix_s - one.started_s)
        return now_s - (min(age_s, now_s - self._looked_s) if self._has_looked else age_s)

    def _seen(self, record: WorkerRecord, now_s: float) -> WorkerSeen:
        load, name = record.load, record.worker_id
        busy = self._busy.get(name, _Busy())
        sets = max(1, busy.sets)
        return WorkerSeen(
            worker_id=name,
            model=record.model,
            role=record.role,
            state=record.state,
            since_s=self._since_s(record, now_s),
            running=load.running,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            context_tokens=load.context_tokens,
            blocks_used=load.blocks_used,
            blocks=record.capacity.blocks,
            start_s=record.startup.total,
            prefill_busy=busy.prefill / sets,
            decode_busy=busy.decode / sets,
        )

    def _since_s(self, record: WorkerRecord, now_s: float) -> float:
        what = (record.epoch, record.role, record.state)
        known = self._since.get(record.worker_id)
        if known is None or known[0] != what:
            known = self._since[record.worker_id] = (what, now_s)
        return known[1]
