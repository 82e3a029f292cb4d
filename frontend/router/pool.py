"""The workers of one model and one role as vectors, one row each: what a decision reads.

A decision over a thousand workers has 200 microseconds, so nothing is collected when a request comes: rows are
written when something changes, and read as a whole.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from frontend.router.ask import Ask
from frontend.router.candidate import Candidate
from frontend.router.speeds import Curve, Vector

Mask = NDArray[np.bool_]

_FLOATS = (
    *("requests", "own_requests", "pending_s", "job_s", "since_s", "jobs", "foreign_s"),
    *("step_s", "joined_step_s", "step_s_per_token", "fresh_requests", "fresh_s", "used_blocks"),
    *("prefill_factor", "handoff_factor", "blocks", "block_tokens", "max_running", "max_model_len"),
    *("piece_s", "tie", "scale", "order_s"),
)
_FIRST_ROWS = 8
_NO_ROWS = np.zeros(0, np.int64)
UNLIMITED = 1e18
MAX_ECHO = 64.0
TIE_SHARE = 1e-3
"""Costs that differ by no more than this are equal, and each frontend has its own order among equals."""


class Pool:
    """Rows are dense: the last one takes the place of one that leaves.

    Attributes:
        requests: open on the worker.
        pending_s, job_s, since_s: this frontend's prompts there, seconds in all, of one, and since when one runs.
        jobs: prompts not yet computed.
        foreign_s: seconds of other frontends' prompts.
        step_s: a decode step now; joined_step_s: with one request more that has no context yet.
        step_s_per_token: what each context token of that one adds.
        piece_s: what a step costs beside the prompt's tokens that are computed in it.
        tie: a number below 1 by which this frontend orders equals; scale and order_s: what costs are multiplied with,
            and what is added to them, for that order.
        own_requests, fresh_requests, fresh_s: this frontend's part, and what of it the worker has not yet spoken of.
        slots, hashes: `Candidate.slot`, and a number made from the worker's name alone.
    """

    requests: Vector
    own_requests: Vector
    pending_s: Vector
    job_s: Vector
    since_s: Vector
    jobs: Vector
    foreign_s: Vector
    step_s: Vector
    joined_step_s: Vector
    step_s_per_token: Vector
    fresh_requests: Vector
    fresh_s: Vector
    used_blocks: Vector
    prefill_factor: Vector
    handoff_factor: Vector
    blocks: Vector
    block_tokens: Vector
    max_running: Vector
    max_model_len: Vector
    piece_s: Vector
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
        self._grouped = False
        self._rows: dict[str, int] = {}
        self._by_host: dict[str, NDArray[np.int64]] = {}
        self._curves: list[tuple[Curve, NDArray[np.int64]]] = []
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
        self.write(one)

    def remove(self, one: Candidate) -> None:
        """Take a candidate's row away."""
        last = self.members.pop()
        if last is not one:
            for vector in (*self._whole.values(), self._ready, self._slots, self._hashes):
                vector[one.row] = vector[last.row]
            last.row = one.row
            self.members[last.row] = last
        one.row = -1
        self._grouped = False
        self._resize()

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
        self._grouped = False

    def known(self, ask: Ask) -> Vector | None:
        """Tokens of the prompt that each worker has; None when nobody has any. The last one is always computed."""
        if ask.known_by_slot is not None:
            inside = self.slots < len(ask.known_by_slot)
            known = ask.known_by_slot[self.slots * inside] * inside if len(ask.known_by_slot) else inside
            return np.minimum(known, max(0.0, ask.prompt_tokens - 1.0)) if known.any() else None
        found: Vector | None = None
        for worker_id, tokens in ask.known.items():
            row = self.rows.get(worker_id)
            if row is not None and tokens > 0:
                found = np.zeros(len(self)) if found is None else found
                found[row] = min(tokens, ask.prompt_tokens - 1)
        return found

    def usable(self, ask: Ask) -> Mask:
        """Which of the workers may be sent this request."""
        usable = self.ready.copy()
        for worker_id in (*ask.excluded, *ask.suspects):
            row = self.rows.get(worker_id)
            if row is not None:
                usable[row] = False
        return usable

    @property
    def echo(self) -> float:
        """How many requests others send for one of this frontend's, by what is open now.

        Everybody sees the same worker become free, and nobody what the others sent there since it last spoke:
        each takes the others to do as it does (on the herd: Mitzenmacher, How Useful Is Old Information, 2000).
        """
        own = float(self.own_requests.sum())
        return min(max(0.0, float(self.requests.sum()) - own) / own, MAX_ECHO) if own else 0.0

    @property
    def rows(self) -> dict[str, int]:
        """By worker id."""
        self._regroup()
        return self._rows

    def on_host(self, host_id: str) -> NDArray[np.int64]:
        """Rows of the workers on one host; none for a host that nobody told."""
        self._regroup()
        return self._by_host.get(host_id, _NO_ROWS)

    def curves(self) -> list[tuple[Curve, NDArray[np.int64]]]:
        """The different speeds, each with the rows of its workers."""
        self._regroup()
        return self._curves

    def _regroup(self) -> None:
        if self._grouped:
            return
        self._grouped = True
        hosts, curves = defaultdict[str, list[int]](list), defaultdict[int, list[int]](list)
        for one in self.members:
            if one.record.host_id:
                hosts[one.record.host_id].append(one.row)
            curves[id(one.curve)].append(one.row)
        self._rows = {one.worker_id: one.row for one in self.members}
        self._by_host = {host: np.array(rows) for host, rows in hosts.items()}
        self._curves = [(self.members[rows[0]].curve, np.array(rows)) for rows in curves.values()]

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
