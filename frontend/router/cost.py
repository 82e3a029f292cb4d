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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from frontend.router.ask import Ask
from frontend.router.pool import Mask, Pool
from frontend.router.route import Predicted
from frontend.router.speeds import Curve, Vector

UNKNOWN_OUTPUT_TOKENS = 128.0
"""An answer's length when neither experience nor the request says one."""

UNKNOWN_WAIT_S = 10.0
"""Until blocks become free on a worker that generates for nobody: handoffs hold them."""


def output_tokens(ask: Ask) -> float:
    """How long the answer is reckoned to be."""
    expected = ask.expected_tokens or UNKNOWN_OUTPUT_TOKENS
    return max(1.0, min(expected, float(ask.max_tokens)) if ask.max_tokens else expected)


@dataclass(slots=True)
class PrefillCosts:
    """By row of a pool, of computing a prompt there. `base_s` is all of it that does not depend on the other worker.

    Attributes:
        known: tokens; None when no worker has any.
        usable_s: `base_s`, infinite for workers that cannot be used.
    """

    pool: Pool
    known: Vector | None
    queue_s: Vector
    compute_s: Vector
    others_s: Vector
    base_s: Vector
    usable_s: Vector

    def new_tokens(self, ask: Ask, row: int) -> int:
        return ask.prompt_tokens - (0 if self.known is None else int(self.known[row]))


@dataclass(slots=True)
class DecodeCosts:
    """By row of a pool, of generating there.

    Attributes:
        slot_s: until there is a place and blocks.
        after_s: from the first step on, the others' delay included.
    """

    pool: Pool
    known: Vector | None
    slot_s: Vector
    step_s: Vector
    others_s: Vector
    after_s: Vector
    usable_s: Vector


@dataclass(slots=True)
class AloneCosts:
    """By row of a decode pool, of computing the prompt there and generating."""

    queue_s: Vector
    compute_s: Vector
    others_s: Vector
    usable_s: Vector


def prompt_queue_s(pool: Pool, now_s: float, echo: float) -> Vector:
    """Seconds of prompts that each worker has yet to compute."""
    # The prompt in work is taken to be through for as long as it has been computed for, but never for more than it.
    done_s = np.minimum(np.maximum(now_s - pool.since_s, 0.0), pool.job_s)
    queue_s = pool.pending_s - done_s + pool.foreign_s
    if echo > 0:
        queue_s += pool.fresh_s * echo
    result: Vector = queue_s
    return result


def compute_s(pool: Pool, prompt_tokens: int, known: Vector | None) -> Vector:
    """Seconds in which each worker computes what it does not have of the prompt, alone."""
    return _by_curve(pool, known, lambda curve, known: curve.prefill_s(prompt_tokens, known)) * pool.prefill_factor


def _by_curve(pool: Pool, known: Vector | None, of: Callable[[Curve, Vector | None], Vector | float]) -> Vector:
    values: Vector = np.empty(len(pool))
    for curve, rows in pool.curves():
        values[rows] = of(curve, None if known is None else known[rows])
    return values


def fits(pool: Pool, usable: Mask, tokens: int) -> Mask:
    """Those whose context is long enough; all when none is, so that a worker says what its limit is."""
    fitting = usable & (pool.max_model_len >= tokens)
    return fitting if fitting.any() else usable


def prefill_costs(ask: Ask, pool: Pool, now_s: float) -> PrefillCosts:
    """Of every worker of a prefill pool."""
    known = pool.known(ask)
    queue_s = prompt_queue_s(pool, now_s, pool.echo)
    own_s = compute_s(pool, ask.prompt_tokens, known)
    behind = float(pool.jobs.sum()) / len(pool)
    others_s = own_s * behind
    base_s = queue_s + own_s + others_s
    usable = fits(pool, pool.usable(ask), ask.prompt_tokens)
    ordered_s = base_s * pool.scale + pool.order_s
    return PrefillCosts(pool, known, queue_s, own_s, others_s, base_s, np.where(usable, ordered_s, np.inf))


def decode_costs(ask: Ask, pool: Pool) -> DecodeCosts:
    """Of every worker of a decode pool."""
    tokens = output_tokens(ask)
    requests = pool.requests
    echo = pool.echo
    if echo > 0:
        requests = requests + pool.fresh_requests * echo
    added_s = pool.step_s_per_token * (ask.prompt_tokens + tokens / 2)
    step_s = pool.joined_step_s + added_s
    if echo > 0:
        step_s = step_s + (pool.joined_step_s - pool.step_s) * pool.fresh_requests * echo
    others_s = requests * np.maximum(step_s - pool.step_s, 0.0) * tokens
    slot_s = _slot_s(ask, pool, requests, step_s * tokens)
    after_s = step_s * tokens + others_s
    usable = fits(pool, pool.usable(ask), ask.prompt_tokens + ask.max_tokens)
    ordered_s = (slot_s + after_s) * pool.scale + pool.order_s
    known = pool.known(ask)
    return DecodeCosts(pool, known, slot_s, step_s, others_s, after_s, np.where(usable, ordered_s, np.inf))


def alone_costs(ask: Ask, decode: DecodeCosts, now_s: float) -> AloneCosts:
    """Of every worker of a decode pool, without a prefill worker."""
    pool = decode.pool
    queue_s = prompt_queue_s(pool, now_s, 0.0)
    chunks_s = _by_curve(pool, decode.known, lambda curve, known: curve.chunk_s(ask.prompt_tokens, known))
    chunks_s *= pool.prefill_factor
    others_s = pool.requests * chunks_s
    # The prompt is computed in pieces, each beside a step of everybody else, or in one of its own where nobody is.
    pieces = _by_curve(pool, decode.known, lambda curve, known: curve.steps(ask.prompt_tokens, known))
    own_s = chunks_s + pieces * pool.piece_s
    return AloneCosts(queue_s, own_s, others_s, decode.usable_s + queue_s + own_s + others_s)


def _slot_s(ask: Ask, pool: Pool, requests: Vector, answer_s: Vector) -> Vector:
    """Until a running answer ends and leaves its place, and until enough blocks are free."""
    over = requests + 1.0 - pool.max_running
    needed = np.ceil((ask.prompt_tokens + 1) / pool.block_tokens)
    short = pool.used_blocks + needed - pool.blocks
    if over.max() <= 0 and (short * (pool.blocks > 0)).max() <= 0:
        return np.zeros(len(pool))
    place_s = np.maximum(over, 0.0) * answer_s / pool.max_running
    running = requests > 0
    blocks_s = np.where(running, short / np.maximum(pool.used_blocks, 1.0) * answer_s, UNKNOWN_WAIT_S)
    slot_s: Vector = np.maximum(place_s, np.where((short > 0) & (pool.blocks > 0), blocks_s, 0.0))
    return slot_s


def predicted_pair(
    ask: Ask, prefills: PrefillCosts, prefill_row: int, decodes: DecodeCosts, decode_row: int, moved_s: float
) -> Predicted:
    """The parts of a pair's cost; `moved_s` is what of the transfer comes after prefill."""
    arrives_s = float(prefills.queue_s[prefill_row] + prefills.compute_s[prefill_row]) + moved_s
    return Predicted(
        new_tokens=prefills.new_tokens(ask, prefill_row),
        queue_s=float(prefills.queue_s[prefill_row]),
        prefill_s=float(prefills.compute_s[prefill_row]),
        transfer_s=moved_s,
        # A place becomes free while the prompt is computed.
        slot_s=max(0.0, float(decodes.slot_s[decode_row]) - arrives_s),
        itl_s=float(decodes.step_s[decode_row]),
        output_tokens=output_tokens(ask),
        others_s=float(prefills.others_s[prefill_row] + decodes.others_s[decode_row]),
    )


def predicted_alone(ask: Ask, decodes: DecodeCosts, alone: AloneCosts, row: int) -> Predicted:
    """The parts of what decode alone costs."""
    known = 0 if decodes.known is None else int(decodes.known[row])
    return Predicted(
        new_tokens=ask.prompt_tokens - known,
        queue_s=float(alone.queue_s[row]),
        prefill_s=float(alone.compute_s[row]),
        transfer_s=0.0,
        slot_s=float(decodes.slot_s[row]),
        itl_s=float(decodes.step_s[row]),
        output_tokens=output_tokens(ask),
        others_s=float(alone.others_s[row] + decodes.others_s[row]),
    )
