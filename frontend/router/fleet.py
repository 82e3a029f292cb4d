"""All workers that a frontend knows, as the router reads them, and the work that each has before it.

Three sources are joined here without counting a request twice: registered records (whole, a second old), cache
feeds (exact, and they say what of the load is this frontend's own), and this frontend's own requests (known at
once). Plain data: no clock, no I/O. The simulator runs the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from frontend.router.candidate import Candidate, Foreign, Share, needed_blocks
from frontend.router.pool import Pool
from frontend.router.speeds import TYPICAL, curve_of
from slipstream.performance import Profile
from slipstream.v1.registry_pb2 import Load, Role, WorkerRecord

FOREIGN_PROMPT_TOKENS = 512
"""What a request of another frontend is taken to wait with on a prefill worker whose record counts requests only."""


@dataclass(slots=True)
class Fleet:
    """Candidates by worker id, in one pool for each model and role.

    Attributes:
        tie_break: a frontend's own name; makes different frontends prefer different workers among equals.
    """

    tie_break: str = ""
    pools: dict[tuple[str, Role.ValueType], Pool] = field(default_factory=dict)
    _members: dict[str, Candidate] = field(default_factory=dict)
    _away: dict[str, Candidate] = field(default_factory=dict)
    _free_slots: list[int] = field(default_factory=list)
    _slots: int = 0

    @property
    def slots(self) -> int:
        """Every `Candidate.slot` is below this."""
        return self._slots

    def get(self, worker_id: str) -> Candidate | None:
        """The worker as it runs now."""
        return self._members.get(worker_id)

    def places(self) -> dict[str, int]:
        """By worker id, the worker's slot."""
        return {worker_id: one.slot for worker_id, one in self._members.items()}

    def pool(self, model: str, role: Role.ValueType) -> Pool | None:
        """The workers of one model and role; None, or empty, when there are none."""
        return self.pools.get((model, role))

    def apply(self, records: Iterable[WorkerRecord]) -> None:
        """These are all workers there are."""
        listed = set()
        for record in records:
            listed.add(record.worker_id)
            self.put(record)
        for worker_id in self._members.keys() - listed:
            self.remove(worker_id)
        self._away = {name: one for name, one in self._away.items() if one.requests}

    def put(self, record: WorkerRecord) -> Candidate:
        """A worker is there, or says something new of itself."""
        one = self._members.get(record.worker_id)
        if one is not None and (one.record.epoch, one.record.model) != (record.epoch, record.model):
            self.remove(record.worker_id)
            one = None
        if one is None:
            return self._enter(record)
        if one.record.role != record.role:
            self._move(one, record)
        if record is not one.record and record != one.record:
            news = record.renewals != one.record.renewals or record.load != one.record.load
            one.take_record(record)
            if news:
                self._note_registered(one)
            one.pool.write(one)
        return one

    def remove(self, worker_id: str) -> None:
        """A worker is gone. Work that it still does for this frontend is remembered in case it comes back."""
        one = self._members.pop(worker_id)
        one.pool.remove(one)
        self._free_slots.append(one.slot)
        if one.requests:
            self._away[worker_id] = one

    def note_profile(self, worker_id: str, profile: Profile | None) -> None:
        """A worker has said how fast it is."""
        one = self._members.get(worker_id)
        if one is not None:
            one.take_profile(profile)
            one.pool.write(one)

    def note_load(self, worker_id: str, load: Load, own: Load, now_s: float) -> None:
        """A worker's feed says what it does, and what of that is for this frontend. From then on its record does not
        count: it is older."""
        one = self._members.get(worker_id)
        if one is None:
            return
        one.heard = True
        one.foreign = Foreign(
            max(0, load.running + load.waiting - own.running - own.waiting),
            max(0, load.waiting_tokens - own.waiting_tokens),
            max(0, load.context_tokens - own.context_tokens),
        )
        one.blocks_used = load.blocks_used
        one.fresh_requests, one.fresh_s, one.fresh_blocks = 0, 0.0, 0
        done_s = min(now_s - one.since_s, one.pending_s / one.jobs) if one.jobs else 0.0
        one.free_at_s = now_s + one.pending_s - done_s + one.foreign_s
        one.refresh()

    def lose_feed(self, worker_id: str) -> None:
        """Nothing comes from a worker's feed any more: its record counts again."""
        one = self._members.get(worker_id)
        if one is not None:
            one.heard = False
            one.refresh()

    def begin(self, worker_id: str, prompt_tokens: int, new_tokens: int, now_s: float) -> Share | None:
        """This frontend sends a request to a worker; end what is returned. None when the worker is gone.

        Args:
            new_tokens: of the prompt, that the worker has to compute; 0 where another one does.
        """
        one = self._members.get(worker_id)
        if one is None:
            return None
        prompt_s = one.curve.predictor.prefill_s(new_tokens, prompt_tokens - new_tokens) * one.prefill.factor
        context_tokens = prompt_tokens if one.record.role == Role.ROLE_DECODE else 0
        if prompt_s > 0:
            if one.jobs == 0:
                one.since_s = now_s
            one.jobs += 1
            one.pending_s += prompt_s
            one.free_at_s = max(one.free_at_s, now_s) + prompt_s
            one.fresh_s += prompt_s
        one.requests += 1
        one.context_tokens += context_tokens
        one.peak_requests = max(one.peak_requests, one.requests)
        one.fresh_requests += 1
        one.fresh_blocks += needed_blocks(prompt_tokens + 1, one.record.capacity.block_tokens)
        one.refresh()
        return Share(one, context_tokens, prompt_s)

    def _move(self, one: Candidate, record: WorkerRecord) -> None:
        """A worker has taken the other role: the same worker with the same cache, work and speed in another pool."""
        one.pool.remove(one)
        pool = self._pool_of(record)
        one.learn_from(pool.members)
        pool.add(one)

    def _pool_of(self, record: WorkerRecord) -> Pool:
        pool = self.pools.get((record.model, record.role))
        if pool is None:
            pool = self.pools[record.model, record.role] = Pool(self.tie_break)
        return pool

    def _enter(self, record: WorkerRecord) -> Candidate:
        pool = self._pool_of(record)
        slot = self._free_slots.pop() if self._free_slots else self._slots
        self._slots = max(self._slots, slot + 1)
        one = self._away.pop(record.worker_id, None)
        if one is None or one.record.epoch != record.epoch:
            one = Candidate(record, slot, pool, -1, curve_of(TYPICAL))
            one.learn_from(pool.members)
        one.slot = slot
        one.take_record(record)
        self._members[record.worker_id] = one
        self._note_registered(one)
        pool.add(one)
        return one

    def _note_registered(self, one: Candidate) -> None:
        """What a record counts beyond this frontend's requests is others' work: all that this one had since the last
        record may be in its figures."""
        if one.heard:
            return
        load = one.record.load
        requests = max(0, load.running + load.waiting - one.peak_requests)
        is_prefill = one.record.role == Role.ROLE_PREFILL
        share = requests / max(1, load.running + load.waiting)
        waiting = round(load.waiting_tokens * share) or (requests * FOREIGN_PROMPT_TOKENS if is_prefill else 0)
        one.foreign = Foreign(requests, waiting, round(load.context_tokens * share))
        one.blocks_used = load.blocks_used
        one.peak_requests = one.requests
        one.fresh_requests, one.fresh_s, one.fresh_blocks = 0, 0.0, 0
