"""One worker as the router sees it, and one request's share of its work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from frontend.router.speeds import PROFILED_BOUND, TYPICAL, UNPROFILED_BOUND, Correction, Curve, curve_of, pass_on
from slipstream.performance import Profile
from slipstream.v1.registry_pb2 import WorkerRecord, WorkerState

if TYPE_CHECKING:
    from frontend.router.pool import Pool

SHM = "shm"
INF = math.inf

CROWDING_S = 1e-3
"""What a cache that is full up costs beyond one that is empty: something is evicted that may be asked for again."""


@dataclass(frozen=True, slots=True)
class Way:
    """How KV blocks come from one worker to another."""

    bytes_per_s: float
    latency_s: float


@dataclass(slots=True)
class Foreign:
    """What a worker does for others than this frontend: requests, their prompt tokens that wait, and their context."""

    requests: int = 0
    waiting_tokens: int = 0
    context_tokens: int = 0


@dataclass(slots=True)
class Counted:
    """Of one worker, or of all: requests, this frontend's part of them, prompts not yet computed, and whether, or how
    many, have anything to compute."""

    requests: int = 0
    own_requests: int = 0
    jobs: int = 0
    waits: int = 0


@dataclass(slots=True)
class Candidate:
    """One incarnation of one worker. Plain data; `frontend.router.fleet` keeps it, and its row in a pool, up to date.

    Attributes:
        slot: a small number that no other worker of the fleet has now; kept as long as the candidate is.
        row: in its pool's vectors; -1 once it has left.
        sender: under which name other workers have measured the way from this one; reachable: whether blocks can leave.
        ranks: among which its KV heads are divided.
        crossing: those of its transports that reach other hosts.
        ways: measured ways to this worker by sender and epoch of its transfer agent; None where none works.
        pending_s, jobs: predicted seconds of this frontend's prompts that it has yet to compute, and their number.
        since_s: when the last of them was done, or the first was sent.
        heard: its feed speaks; free_at_s: when it will have computed all prompts, by what that said and was sent since.
        counted: in its pool's totals.
        fresh_requests, fresh_s, fresh_blocks: sent since the worker's last word, which cannot know of them.
    """

    record: WorkerRecord
    slot: int
    pool: Pool
    row: int
    curve: Curve
    transports: frozenset[str] = frozenset()
    ways: dict[tuple[str, int], Way | None] = field(default_factory=dict)
    worker_id: str = ""
    host_id: str = ""
    sender: tuple[str, int] = ("", 0)
    reachable: bool = False
    ranks: int = 1
    crossing: frozenset[str] = frozenset()
    block_tokens: int = 1
    block_bytes: int = 0
    prefill: Correction = field(default_factory=lambda: Correction(UNPROFILED_BOUND))
    step: Correction = field(default_factory=lambda: Correction(UNPROFILED_BOUND))
    handoff: Correction = field(default_factory=lambda: Correction(UNPROFILED_BOUND))
    foreign: Foreign = field(default_factory=Foreign)
    blocks_used: int = 0
    requests: int = 0
    context_tokens: int = 0
    pending_s: float = 0.0
    jobs: int = 0
    since_s: float = 0.0
    peak_requests: int = 0
    fresh_requests: int = 0
    fresh_s: float = 0.0
    fresh_blocks: int = 0
    heard: bool = False
    free_at_s: float = 0.0
    counted: Counted = field(default_factory=Counted)

    @property
    def takes_requests(self) -> bool:
        return self.record.state == WorkerState.READY

    @property
    def foreign_s(self) -> float:
        """Seconds of others' prompts, when it last spoke."""
        return self.foreign.waiting_tokens * self.curve.s_per_token * self.prefill.factor

    def take_record(self, record: WorkerRecord) -> None:
        """What it says of itself now."""
        self.record = record
        self.worker_id, self.host_id = record.worker_id, record.host_id
        self.sender = record.worker_id, record.transfer.epoch
        self.reachable = bool(record.transfer.address)
        self.ranks = max(1, len(record.transfer.ranks))
        self.transports = frozenset(record.transfer.transports)
        self.crossing = self.transports - {SHM}
        self.block_tokens, self.block_bytes = max(1, record.capacity.block_tokens), record.capacity.block_bytes
        self.ways = {}
        for path in record.paths:
            sender = path.peer_worker_id, path.peer_epoch
            best = self.ways.get(sender)
            if path.error:
                self.ways.setdefault(sender, None)
            elif best is None or path.bytes_per_s > best.bytes_per_s:
                self.ways[sender] = Way(path.bytes_per_s, path.latency_s)

    def take_profile(self, profile: Profile | None) -> None:
        """How fast it is, by its own word. Experience with another profile is of no use for this one."""
        wanted = TYPICAL if profile is None else profile
        if self.curve.predictor.profile == wanted:
            return
        self.curve = curve_of(wanted)
        bound = UNPROFILED_BOUND if wanted is TYPICAL else PROFILED_BOUND
        self.prefill, self.step, self.handoff = Correction(bound), Correction(bound), Correction(UNPROFILED_BOUND)
        self.learn_from(self.pool.members)

    def learn_from(self, peers: Sequence[Candidate]) -> None:
        """What its like have shown is a better beginning than a profile alone."""
        like = [one for one in peers if one.curve is self.curve]
        self.prefill.start_from([one.prefill for one in like])
        self.step.start_from([one.step for one in like])
        self.handoff.start_from([one.handoff for one in like])

    def teach(self) -> None:
        """Those of its kind that have not shown themselves yet are taken to be as fast as those that have."""
        like = [one for one in self.pool.members if one.curve is self.curve]
        changed = [
            pass_on([one.prefill for one in like]),
            pass_on([one.step for one in like]),
            pass_on([one.handoff for one in like]),
        ]
        if any(changed):
            for one in like:
                if not (one.prefill.known and one.step.known and one.handoff.known):
                    one.refresh()

    @property
    def experience(self) -> int:
        """Samples of all that it was seen to do."""
        return self.prefill.samples + self.step.samples + self.handoff.samples

    def refresh(self) -> None:
        """Write what changes with each request into the pool's row."""
        row, pool = self.row, self.pool
        if row < 0:
            return
        foreign = self.foreign
        requests = self.requests + foreign.requests
        jobs = self.jobs + (foreign.requests if foreign.waiting_tokens else 0)
        foreign_s = self.foreign_s
        behind_s = self.pending_s - self.pending_s / self.jobs if self.jobs else 0.0
        pool.requests[row] = requests
        pool.own_requests[row] = self.requests
        pool.jobs[row] = jobs
        pool.pending_s[row] = self.pending_s
        pool.foreign_s[row] = foreign_s
        # The prompt in work is taken to be through for as long as it has been computed for, but never for more than it.
        # A worker that speaks does so at a known time, since when it has computed others' prompts too.
        through_at_s = self.since_s + self.pending_s + foreign_s if self.jobs else foreign_s
        pool.through_at_s[row] = self.free_at_s if self.heard else through_at_s
        pool.behind_s[row] = behind_s if self.heard else behind_s + foreign_s
        pool.fresh_requests[row] = self.fresh_requests
        pool.fresh_s[row] = self.fresh_s
        pool.prefill_factor[row] = prefill_factor = self.prefill.factor
        pool.handoff_factor[row] = self.handoff.factor
        pool.alone_factor[row] = prefill_factor * (1 + requests)
        # In tenths of the cache: a block more or less is no reason to leave a worker whose prefix cache is warm.
        used = self.blocks_used + self.fresh_blocks
        tie, blocks, places = pool.tie.item(row), self.record.capacity.blocks, pool.max_running.item(row) - requests
        pool.used_blocks[row] = used
        pool.order_s[row] = round(used / max(1.0, blocks), 1) * CROWDING_S + 1e-6 * tie if self.takes_requests else INF
        free_tokens = (blocks - used) * self.block_tokens if blocks else INF
        pool.free_tokens[row] = free_tokens if places >= 1 else -1.0
        self._write_steps(requests, prefill_factor)
        pool.count(self, Counted(requests, self.requests, jobs, int(self.pending_s > 0 or foreign_s > 0)))

    def _write_steps(self, requests: int, prefill_factor: float) -> None:
        """What a request more costs in steps, to itself and to those that are there: `frontend.router.cost`."""
        row, pool, predictor, factor = self.row, self.pool, self.curve.predictor, self.step.factor
        context, joined = self.context_tokens + self.foreign.context_tokens, requests + 1
        step_s = predictor.decode_s(requests, context / requests) * factor if requests else 0.0
        with_one_s = predictor.decode_s(joined, context / joined) * factor
        # One more never makes a step shorter: where a profile says so, that is noise.
        more_s = max(0.0, with_one_s - step_s)
        per_token_s = max(0.0, predictor.decode_s(joined, context / joined + 1.0) * factor - with_one_s) / joined
        scale, fresh = pool.scale.item(row), self.fresh_requests
        pool.step_s[row] = step_s
        pool.joined_step_s[row] = step_s + more_s
        pool.step_s_per_token[row] = per_token_s
        pool.piece_s[row] = step_s if requests else predictor.step_overhead_s * prefill_factor
        pool.after_s[row] = scale * (step_s + more_s * joined)
        pool.after_s_per_token[row] = scale * per_token_s * joined
        pool.echo_s[row] = scale * more_s * fresh * (requests + 2)
        pool.echo_s_per_token[row] = scale * per_token_s * fresh
        pool.echo_squared_s[row] = scale * more_s * fresh * fresh


@dataclass(slots=True)
class Share:
    """One request's part of a worker's work, counted from its construction on by `Fleet.begin`; end it in any case.

    Attributes:
        prompt_s: predicted seconds of computation that the prompt costs this worker; 0 where it computes none.
    """

    candidate: Candidate
    context_tokens: int
    prompt_s: float
    _waits: bool = False
    _open: bool = True

    def __post_init__(self) -> None:
        self._waits = self.prompt_s > 0

    def prompt_done(self, now_s: float) -> None:
        """The prompt is computed: those behind it are next."""
        if not self._waits:
            return
        self._waits = False
        one = self.candidate
        one.jobs -= 1
        one.pending_s = max(0.0, one.pending_s - self.prompt_s) if one.jobs else 0.0
        one.since_s = now_s
        # All that is left of this frontend's has yet to begin; of others' there may be anything between none and all.
        least_s = now_s + one.pending_s
        one.free_at_s = min(max(one.free_at_s, least_s), least_s + one.foreign_s)
        one.refresh()

    def end(self, now_s: float) -> None:
        """The worker has nothing more to do with the request. Again is fine."""
        if not self._open:
            return
        self._open = False
        one = self.candidate
        one.requests -= 1
        one.context_tokens -= self.context_tokens
        assert one.requests >= 0, f"more requests ended on {one.worker_id} than began"
        self.prompt_done(now_s)
        one.refresh()


def needed_blocks(tokens: int, block_tokens: int) -> int:
    return math.ceil(tokens / max(1, block_tokens))
