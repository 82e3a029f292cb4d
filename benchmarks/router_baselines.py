"""What other routers decide by, as policies for the simulator. Their published rules on our figures, nothing more.

Both choose the two workers one after the other and never leave prefill out.
"""

from __future__ import annotations

import numpy as np

from frontend.router.ask import Ask
from frontend.router.choice import check
from frontend.router.fleet import Fleet
from frontend.router.policies import scored
from frontend.router.pool import Pool
from frontend.router.route import Route
from frontend.router.speeds import Vector

QUEUE_WEIGHT, KV_WEIGHT, PREFIX_WEIGHT = 2.0, 2.0, 3.0
"""llm-d's published weights of its queue, KV utilization and prefix scorers."""

AFFINITY_SHARE = 0.80
"""llm-d's prefix-affinity filter: workers that have this share of the prompt go before all others..."""

AFFINITY_PENALTY_S = 18.0
"""...unless the time to the first token there is this much longer."""


class LlmD:
    """llm-d's endpoint picker: weighted scores between 0 and 1, the highest sum wins."""

    def choose(self, ask: Ask, fleet: Fleet, now_s: float) -> Route:
        check(ask, fleet)
        return scored(ask, fleet, lambda pool: _llm_d(ask, pool), lambda pool: _llm_d(ask, pool), "llm_d")


class Dynamo:
    """Dynamo's KV router at temperature 0: the least `overlap weight * prefill blocks + decode blocks`.

    Prefill blocks are those that the worker has yet to compute, this prompt's missing ones included; decode blocks
    those that its sequences hold. The overlap weight is its default, 1. Decode is chosen by blocks alone.
    """

    def choose(self, ask: Ask, fleet: Fleet, now_s: float) -> Route:
        check(ask, fleet)
        return scored(
            ask, fleet, lambda pool: _dynamo(ask, pool), lambda pool: pool.used_blocks + 1e-3 * pool.tie, "dynamo"
        )


def _llm_d(ask: Ask, pool: Pool) -> Vector:
    known = pool.known(ask)
    share = np.zeros(len(pool)) if known is None else known / max(1, ask.prompt_tokens)
    queue = pool.requests
    spread = queue.max() - queue.min()
    queue_score = (queue.max() - queue) / spread if spread > 0 else np.ones(len(pool))
    kv_score = 1.0 - pool.used_blocks / np.maximum(pool.blocks, 1.0)
    score = QUEUE_WEIGHT * queue_score + KV_WEIGHT * kv_score + PREFIX_WEIGHT * share
    near = share >= AFFINITY_SHARE
    if near.any():
        wait_s = pool.pending_s + pool.foreign_s
        if wait_s[near].min() - wait_s.min() <= AFFINITY_PENALTY_S:
            score = np.where(near, score + 100.0, score)
    result: Vector = -score + 1e-6 * pool.tie
    return result


def _dynamo(ask: Ask, pool: Pool) -> Vector:
    known = pool.known(ask)
    missing = ask.prompt_tokens - (np.zeros(len(pool)) if known is None else known)
    s_per_token = np.array([one.curve.s_per_token for one in pool.members])
    waiting = (pool.pending_s + pool.foreign_s) / s_per_token
    cost: Vector = (waiting + missing) / pool.block_tokens + pool.used_blocks + 1e-3 * pool.tie
    return cost
