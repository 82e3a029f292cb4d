"""What a choice costs, as predicted time, for all workers of a pool at once.

The cost is the waiting that a choice adds to everybody, and a second of another request weighs what a second of this
one does. There is nothing to tune:

- the request itself waits until its prompt's computation begins, for the computation, for what of the transfer is
  not hidden behind it, for a place on the decode worker, and then one decode step for each token of its answer;
- prompts that will stand behind this one wait for its computation: in a queue in balance as many come to stand behind
  a request as it finds (Little's law), so the pool's mean queue is their number;
- requests that the decode worker generates for wait longer in each step that this one takes part in, and as long as
  it computes where decode computes the prompt itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frontend.depths import Depths, Levels
from frontend.router.ask import Ask
from frontend.router.pool import Mask, Pool
from frontend.router.route import Predicted
from frontend.router.speeds import Rest, Vector

UNKNOWN_OUTPUT_TOKENS = 128.0
"""An answer's length when neither experience nor the request says one."""

UNKNOWN_WAIT_S = 10.0
"""Until blocks become free on a worker that generates for nobody: handoffs hold them."""

_NOTHING = (0,)


def output_tokens(ask: Ask) -> float:
    """How long the answer is reckoned to be."""
    expected = ask.expected_tokens or UNKNOWN_OUTPUT_TOKENS
    return max(1.0, min(expected, float(ask.max_tokens)) if ask.max_tokens else expected)


@dataclass(slots=True)
class Rests:
    """What computing the rest of the prompt takes, by row of a pool: few different values, and which is whose.

    Attributes:
        of: by curve of the pool, and for each by depth.
        at: by row, which of all these values, the first curve's first; None: the only one.
    """

    pool: Pool
    depths: Depths | None
    of: list[Rest]
    at: Levels | None

    @classmethod
    def in_(cls, pool: Pool, ask: Ask) -> Rests:
        depths, curves = pool.depths(ask), pool.curves
        different = _NOTHING if depths is None else depths.depths
        of = [curve.rest(ask.prompt_tokens, different) for curve in curves]
        at = None if depths is None else depths.levels
        if len(curves) > 1:
            first = pool.curve_of * len(different)
            at = first if at is None else at + first
        return cls(pool, depths, of, at)

    def chunks_s(self) -> list[float]:
        """Of a prompt's tokens, beside steps that run anyway."""
        return self.of[0].chunks_s if len(self.of) == 1 else [one for rest in self.of for one in rest.chunks_s]

    def steps(self) -> list[int]:
        return self.of[0].steps if len(self.of) == 1 else [one for rest in self.of for one in rest.steps]

    def alone_s(self) -> list[float]:
        """Of a prompt that is computed alone."""
        found = list[float]()
        for curve, rest in zip(self.pool.curves, self.of, strict=True):
            overhead_s = curve.predictor.step_overhead_s
            found += [chunks_s + steps * overhead_s for chunks_s, steps in zip(rest.chunks_s, rest.steps, strict=True)]
        return found

    def times(self, values: Sequence[float], factors: Vector) -> Vector:
        """Each row's value times its factor."""
        if self.at is None:
            return factors * values[0]
        product: Vector = np.array(values, np.float64).take(self.at)
        product *= factors
        return product

    def value(self, values: Sequence[float], row: int) -> float:
        return values[0 if self.at is None else self.at.item(row)]

    def known(self, row: int) -> int:
        """Tokens."""
        return 0 if self.depths is None else self.depths.at(row)


@dataclass(slots=True)
class PrefillCosts:
    """By row of a pool, of computing a prompt there.

    Attributes:
        behind: how many prompts are reckoned to wait for this one.
        usable_s: all that does not depend on the other worker, in this frontend's order; infinite for workers that
            cannot be used.
    """

    pool: Pool
    rests: Rests
    alone_s: list[float]
    now_s: float
    echo: float
    behind: float
    usable_s: Vector

    def queue_s(self, row: int) -> float:
        pool = self.pool
        queue_s = max(pool.through_at_s.item(row) - self.now_s, pool.behind_s.item(row))
        return queue_s + pool.fresh_s.item(row) * self.echo if self.echo else queue_s

    def compute_s(self, row: int) -> float:
        return self.rests.value(self.alone_s, row) * self.pool.prefill_factor.item(row)

    def new_tokens(self, ask: Ask, row: int) -> int:
        return ask.prompt_tokens - self.rests.known(row)


@dataclass(slots=True)
class DecodeCosts:
    """By row of a pool, of generating there.

    Attributes:
        tokens: of the answer; mean_tokens: of prompt and answer, while it is generated.
        slots_s: until there is a place and blocks; None when there is room everywhere.
        usable_s: the wait for a place, and all from the first step on, the others' delay included; as for prefill.
    """

    pool: Pool
    rests: Rests
    tokens: float
    mean_tokens: float
    echo: float
    slots_s: Vector | None
    usable_s: Vector

    def slot_s(self, row: int) -> float:
        return 0.0 if self.slots_s is None else self.slots_s.item(row)

    def step_s(self, row: int) -> float:
        pool = self.pool
        step_s = pool.joined_step_s.item(row) + pool.step_s_per_token.item(row) * self.mean_tokens
        if self.echo:
            more_s = pool.joined_step_s.item(row) - pool.step_s.item(row)
            step_s += more_s * pool.fresh_requests.item(row) * self.echo
        return step_s

    def others_s(self, row: int) -> float:
        pool = self.pool
        requests = pool.requests.item(row) + pool.fresh_requests.item(row) * self.echo
        return requests * (self.step_s(row) - pool.step_s.item(row)) * self.tokens


@dataclass(slots=True)
class Pair:
    """One choice of two workers, by their rows.

    Attributes:
        moved_s: what of the transfer comes after the prompt's computation.
        ordered_s: its cost with this frontend's order among equals.
    """

    prefill: int
    decode: int
    moved_s: float
    ordered_s: float


@dataclass(slots=True)
class AloneCosts:
    """By row of a decode pool, of computing the prompt there and generating."""

    decodes: DecodeCosts
    now_s: float
    usable_s: Vector

    def queue_s(self, row: int) -> float:
        pool = self.decodes.pool
        return max(pool.through_at_s.item(row) - self.now_s, pool.behind_s.item(row))

    def chunks_s(self, row: int) -> float:
        rests = self.decodes.rests
        return rests.value(rests.chunks_s(), row) * self.decodes.pool.prefill_factor.item(row)

    def compute_s(self, row: int) -> float:
        rests = self.decodes.rests
        return self.chunks_s(row) + rests.value(rests.steps(), row) * self.decodes.pool.piece_s.item(row)

    def others_s(self, row: int) -> float:
        return self.chunks_s(row) * self.decodes.pool.requests.item(row)


def prompt_queue_s(pool: Pool, now_s: float, echo: float) -> Vector:
    """Seconds of prompts that each worker has yet to compute. Never before the last `Share` began or ended."""
    queue_s: Vector = pool.through_at_s - now_s
    np.maximum(queue_s, pool.behind_s, out=queue_s)
    if echo > 0:
        queue_s += pool.fresh_s * echo
    return queue_s


def fits(pool: Pool, usable: Mask, tokens: int) -> Mask:
    """Those whose context is long enough; all when none is, so that a worker says what its limit is."""
    fitting = usable & (pool.max_model_len >= tokens)
    return fitting if fitting.any() else usable


def prefill_costs(ask: Ask, pool: Pool, now_s: float) -> PrefillCosts:
    """Of every worker of a prefill pool."""
    rests, echo, behind = Rests.in_(pool, ask), pool.echo, pool.totals.jobs / len(pool)
    alone_s = rests.alone_s()
    costs_s = rests.times([one_s * (1.0 + behind) for one_s in alone_s], pool.prefill_factor)
    costs_s += prompt_queue_s(pool, now_s, echo)
    costs_s *= pool.scale
    costs_s += pool.order_s
    pool.bar(costs_s, ask, ask.prompt_tokens)
    return PrefillCosts(pool, rests, alone_s, now_s, echo, behind, costs_s)


def decode_costs(ask: Ask, pool: Pool) -> DecodeCosts:
    """Of every worker of a decode pool.

    A step with this request takes `step = joined_step + step_per_token * mean_tokens`, and each of the others waits
    `step - step now` longer in it. Both together are linear in `mean_tokens`, and what depends on the worker alone is
    written down with each change (`Candidate.refresh`). With others' requests reckoned in, which we take to have come
    in proportion to our fresh ones, it is a polynomial of that proportion, `echo`.
    """
    tokens, echo = output_tokens(ask), pool.echo
    mean_tokens = ask.prompt_tokens + tokens / 2
    costs_s: Vector = pool.after_s_per_token * (tokens * mean_tokens)
    costs_s += pool.after_s * tokens
    if echo > 0:
        costs_s += pool.echo_s * (tokens * echo)
        costs_s += pool.echo_s_per_token * (tokens * mean_tokens * echo)
        costs_s += pool.echo_squared_s * (tokens * echo * echo)
    costs_s += pool.order_s
    pool.bar(costs_s, ask, ask.prompt_tokens + ask.max_tokens)
    costs = DecodeCosts(pool, Rests.in_(pool, ask), tokens, mean_tokens, echo, None, costs_s)
    tight = _without_room(ask, pool, echo)
    if tight is not None:
        costs.slots_s = np.zeros(len(pool))
        costs.slots_s[tight] = _slots_s(ask, costs, tight)
        costs_s += costs.slots_s * pool.scale
    return costs


def alone_costs(ask: Ask, decodes: DecodeCosts, now_s: float) -> AloneCosts:
    """Of every worker of a decode pool, without a prefill worker.

    The prompt is computed in pieces, each beside a step of everybody else, or in one of its own where nobody is.
    """
    pool, rests = decodes.pool, decodes.rests
    costs_s = rests.times(rests.chunks_s(), pool.alone_factor)
    costs_s += rests.times(rests.steps(), pool.piece_s)
    costs_s += decodes.usable_s
    if pool.totals.waits:
        costs_s += prompt_queue_s(pool, now_s, 0.0)
    return AloneCosts(decodes, now_s, costs_s)


def _without_room(ask: Ask, pool: Pool, echo: float) -> Levels | None:
    """Rows of workers that have no place, or too few free blocks; None when there are none."""
    free = pool.free_tokens
    if echo > 0:
        others = pool.fresh_requests * echo
        free = np.where(pool.requests + others + 1.0 > pool.max_running, -1.0, free)
    if free.item(free.argmin()) >= ask.prompt_tokens + 1:
        return None
    return np.flatnonzero(free < ask.prompt_tokens + 1)


def _slots_s(ask: Ask, costs: DecodeCosts, rows: Levels) -> Vector:
    """Until a running answer ends and leaves its place, and until enough blocks are free."""
    pool, echo = costs.pool, costs.echo
    requests = pool.requests[rows] + pool.fresh_requests[rows] * echo
    max_running, used, blocks = pool.max_running[rows], pool.used_blocks[rows], pool.blocks[rows]
    answer_s = np.array([costs.step_s(row) for row in rows.tolist()]) * costs.tokens
    place_s = np.maximum(requests + 1.0 - max_running, 0.0) * answer_s / max_running
    short = used + np.ceil((ask.prompt_tokens + 1) / pool.block_tokens[rows]) - blocks
    blocks_s = np.where(requests > 0, short / np.maximum(used, 1.0) * answer_s, UNKNOWN_WAIT_S)
    slots_s: Vector = np.maximum(place_s, np.where((short > 0) & (blocks > 0), blocks_s, 0.0))
    return slots_s


def predicted_pair(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts, pair: Pair) -> Predicted:
    """The parts of a pair's cost."""
    row, queue_s, compute_s = pair.prefill, prefills.queue_s(pair.prefill), prefills.compute_s(pair.prefill)
    return Predicted(
        prefills.new_tokens(ask, row),
        queue_s,
        compute_s,
        pair.moved_s,
        # A place becomes free while the prompt is computed.
        max(0.0, decodes.slot_s(pair.decode) - (queue_s + compute_s + pair.moved_s)),
        decodes.step_s(pair.decode),
        decodes.tokens,
        compute_s * prefills.behind + decodes.others_s(pair.decode),
    )


def predicted_alone(ask: Ask, alone: AloneCosts, row: int) -> Predicted:
    """The parts of what decode alone costs."""
    decodes = alone.decodes
    return Predicted(
        ask.prompt_tokens - decodes.rests.known(row),
        alone.queue_s(row),
        alone.compute_s(row),
        0.0,
        decodes.slot_s(row),
        decodes.step_s(row),
        decodes.tokens,
        alone.others_s(row) + decodes.others_s(row),
    )
