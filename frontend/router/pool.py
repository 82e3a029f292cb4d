"""The workers of one model and one role as vectors, one row each: what a decision reads.

A decision over a thousand workers has 200 microseconds, so nothing is collected when a request comes: rows are
written when something changes, and read as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from frontend.depths import Depths, Levels
from frontend.router.ask import Ask
from frontend.router.candidate import Candidate, Counted
from frontend.router.speeds import Curve, Vector

Mask = NDArray[np.bool_]

_FLOATS = (
    *("requests", "own_requests", "jobs", "pending_s", "foreign_s", "fresh_requests", "fresh_s"),
    *("used_blocks", "blocks", "block_tokens", "max_running", "max_model_len"),
    *("step_s", "joined_step_s", "step_s_per_token", "piece_s", "prefill_factor", "handoff_factor"),
    *("through_at_s", "behind_s", "after_s", "after_s_per_token", "echo_s", "echo_s_per_token", "echo_squared_s"),
    *("alone_factor", "free_tokens", "tie", "scale", "order_s"),
)
_FIRST_ROWS = 8
UNLIMITED = 1e18
MAX_ECHO = 64.0
TIE_SHARE = 1e-3
"""Costs that differ by no more than this are equal, and each frontend has its own order among equals."""


class Pool:
    """Rows are dense: the last one takes the place of one that leaves.

    Attributes:
        requests: open on the worker; jobs: prompts of them not yet computed.
        pending_s: this frontend's prompts there, in seconds; foreign_s: other frontends'.
        step_s: a decode step now; joined_step_s: with one request more that has no context yet, which never is less.
        step_s_per_token: what each context token of that one adds.
        piece_s: what a step costs beside the prompt's tokens that are computed in it.
        tie: a number below 1 by which this frontend orders equals; scale and order_s: what costs are multiplied with,
            and what is added to them, for that order; `order_s` is infinite for workers that take no requests.
        own_requests, fresh_requests, fresh_s: this frontend's part, and what of it the worker has not yet spoken of.
        slots, hashes: `Candidate.slot`, and a number made from the worker's name alone.

    What a decision multiplies and adds, so that it need not be made of the above for each one:
        through_at_s, behind_s: the queue is what is left until the first, if all goes on as predicted, and at least
            the second, what stands behind the prompt in work.
        after_s, after_s_per_token, echo_s, echo_s_per_token, echo_squared_s: see `frontend.router.cost.decode_costs`.
        alone_factor: by how much a prompt computed on a decode worker makes all of its requests wait, over the profile.
        free_tokens: that still fit; below 0 when there is no place for a request.
        totals: over all rows.
    """

    requests: Vector
    own_requests: Vector
    jobs: Vector
    pending_s: Vector
    foreign_s: Vector
    fresh_requests: Vector
    fresh_s: Vector
    used_blocks: Vector
    blocks: Vector
    block_tokens: Vector
    max_running: Vector
    max_model_len: Vector
    step_s: Vector
    joined_step_s: Vector
    step_s_per_token: Vector
    piece_s: Vector
    prefill_factor: Vector
    handoff_factor: Vector
    through_at_s: Vector
    behind_s: Vector
    after_s: Vector
    after_s_per_token: Vector
    echo_s: Vector
    echo_s_per_token: Vector
    echo_squared_s: Vector
    alone_factor: Vector
    free_tokens: Vector
    tie: Vector
    scale: Vector
    order_s: Vector
    ready: Mask
    slots: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    _ready: Mask
    _slots: NDArray[np.int64]
    _hashes: NDArray[np.uint64]

    def __init__(self, tie_break: str) -> None:
        self._tie_break = tie_break
        self._whole: dict[str, Vector] = {name: np.zeros(_FIRST_ROWS) for name in _FLOATS}
        self._ready = np.zeros(_FIRST_ROWS, np.bool_)
        self._slots = np.zeros(_FIRST_ROWS, np.int64)
        self._hashes = np.zeros(_FIRST_ROWS, np.uint64)
        self.members: list[Candidate] = []
        self.totals = Counted()
        self._rows: dict[str, int] = {}
        self._hosts: list[str] = []
        self._by_host: dict[str, list[int]] = {}
        self._curves: list[Curve] = []
        self._curve_of: Levels = np.zeros(0, np.intp)
        self._grouped = self._summed = False
        self._takers, self._least_model_len, self._most_slot = 0, UNLIMITED, -1
        self._resize()

    def __len__(self) -> int:
        return len(self.members)

    def add(self, one: Candidate) -> None:
        """Give a candidate its row."""
        one.pool, one.row = self, len(self.members)
        self.members.append(one)
        if len(self.members) > len(self._ready):
            self._grow()
        self._resize()
        self._grouped = False
        self.write(one)

    def remove(self, one: Candidate) -> None:
        """Take a candidate's row away."""
        self.count(one, Counted())
        last = self.members.pop()
        if last is not one:
            for vector in (*self._whole.values(), self._ready, self._slots, self._hashes):
                vector[one.row] = vector[last.row]
            last.row = one.row
            self.members[last.row] = last
        one.row = -1
        self._grouped = self._summed = False
        self._resize()

    def count(self, one: Candidate, now: Counted) -> None:
        """What a candidate adds to the totals from now on."""
        before, totals = one.counted, self.totals
        totals.requests += now.requests - before.requests
        totals.own_requests += now.own_requests - before.own_requests
        totals.jobs += now.jobs - before.jobs
        totals.waits += now.waits - before.waits
        one.counted = now

    def write(self, one: Candidate) -> None:
        """Write the whole row: the record, or the profile, changed."""
        row, capacity = one.row, one.record.capacity
        self.ready[row] = one.takes_requests
        self.slots[row] = one.slot
        self.blocks[row] = capacity.blocks
        self.block_tokens[row] = max(1, capacity.block_tokens)
        self.max_running[row] = capacity.max_running or UNLIMITED
        self.max_model_len[row] = capacity.max_model_len or UNLIMITED
        self.hashes[row] = xxh3_64_intdigest(one.worker_id.encode())
        self.tie[row] = xxh3_64_intdigest(f"{self._tie_break}/{one.worker_id}".encode()) / 2.0**64
        self.scale[row] = 1.0 + TIE_SHARE * self.tie[row]
        one.refresh()
        self._summed = False
        if self._grouped and (self._curves[self._curve_of[row]], self._hosts[row]) != (one.curve, one.host_id):
            self._grouped = False

    def depths(self, ask: Ask) -> Depths | None:
        """By row, the tokens of the prompt that a worker has; None when nobody has any. The last one is always
        computed."""
        most = max(0, ask.prompt_tokens - 1)
        by_slot = ask.known_by_slot
        if by_slot is None:
            rows = self.rows if ask.known else {}
            by_row = {rows[one]: min(tokens, most) for one, tokens in ask.known.items() if one in rows and tokens > 0}
            return Depths.of(by_row, len(self)) if by_row else None
        if len(by_slot.depths) == 1:
            return None
        self._sum()
        levels = by_slot.levels
        if self._most_slot >= len(levels):
            levels = np.concatenate([levels, np.zeros(self._most_slot + 1 - len(levels), np.intp)])
        depths = by_slot.depths
        if max(depths) > most:
            depths = tuple([min(depth, most) for depth in depths])
        return Depths(depths, levels.take(self.slots))

    def known(self, ask: Ask) -> Vector | None:
        """`depths` as a vector of tokens."""
        depths = self.depths(ask)
        if depths is None or not depths.levels.any():
            return None
        known: Vector = np.array(depths.depths, np.float64).take(depths.levels)
        return known

    def usable(self, ask: Ask) -> Mask:
        """Which of the workers may be sent this request."""
        usable = self.ready.copy()
        usable[self._refused(ask)] = False
        return usable

    def can_take(self, ask: Ask) -> bool:
        """Whether any of the workers may be sent this request."""
        self._sum()
        return self._takers > len(ask.excluded) + len(ask.suspects) or bool(self.usable(ask).any())

    def bar(self, costs: Vector, ask: Ask, tokens: int) -> None:
        """Make the costs of those infinite that may not be sent this request, or have no context of so many tokens.

        When none has, all stay as they are, so that a worker says what its limit is.
        """
        if ask.excluded or ask.suspects:
            costs[self._refused(ask)] = np.inf
        self._sum()
        if tokens > self._least_model_len:
            long = self.max_model_len >= tokens
            if (costs[long] < np.inf).any():
                costs[~long] = np.inf

    def _refused(self, ask: Ask) -> list[int]:
        rows = self.rows
        return [rows[one] for one in (*ask.excluded, *ask.suspects) if one in rows]

    @property
    def echo(self) -> float:
        """How many requests others send for one of this frontend's, by what is open now.

        Everybody sees the same worker become free, and nobody what the others sent there since it last spoke:
        each takes the others to do as it does (on the herd: Mitzenmacher, How Useful Is Old Information, 2000).
        """
        own, requests = self.totals.own_requests, self.totals.requests
        return min(max(0.0, requests - own) / own, MAX_ECHO) if own else 0.0

    @property
    def rows(self) -> dict[str, int]:
        """By worker id."""
        self._regroup()
        return self._rows

    def on_host(self, host_id: str) -> Sequence[int]:
        """Rows of the workers on one host; none for a host that nobody told."""
        self._regroup()
        return self._by_host.get(host_id, ())

    @property
    def curves(self) -> Sequence[Curve]:
        """The different speeds."""
        self._regroup()
        return self._curves

    @property
    def curve_of(self) -> Levels:
        """By row, which of the `curves`."""
        self._regroup()
        return self._curve_of

    def _regroup(self) -> None:
        if self._grouped:
            return
        self._grouped = True
        self._rows = {one.worker_id: one.row for one in self.members}
        self._hosts = [one.host_id for one in self.members]
        hosts, curves = defaultdict[str, list[int]](list), dict[int, int]()
        self._curves, self._curve_of = [], np.zeros(len(self), np.intp)
        for one in self.members:
            if one.host_id:
                hosts[one.host_id].append(one.row)
            if id(one.curve) not in curves:
                curves[id(one.curve)] = len(self._curves)
                self._curves.append(one.curve)
            self._curve_of[one.row] = curves[id(one.curve)]
        self._by_host = dict(hosts)

    def _sum(self) -> None:
        if self._summed:
            return
        self._summed = True
        self._takers = int(np.count_nonzero(self.ready))
        self._least_model_len = float(self.max_model_len.min(initial=UNLIMITED))
        self._most_slot = int(self.slots.max(initial=-1))

    def _grow(self) -> None:
        for name, vector in self._whole.items():
            self._whole[name] = np.concatenate([vector, np.zeros_like(vector)])
        self._ready = np.concatenate([self._ready, np.zeros_like(self._ready)])
        self._slots = np.concatenate([self._slots, np.zeros_like(self._slots)])
        self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])

    def _resize(self) -> None:
        size = len(self.members)
        for name, vector in self._whole.items():
            setattr(self, name, vector[:size])
        self.ready, self.slots, self.hashes = self._ready[:size], self._slots[:size], self._hashes[:size]
