"""The default policy, `kv`: the choice that is predicted to make everybody wait the least.

What a worker has of the prompt already makes its computation shorter and nothing else, so a prefix counts for exactly
what it saves: a common system prompt does not draw all requests to one worker once its queue outweighs it.
"""

from __future__ import annotations

import numpy as np

from frontend.router.ask import Ask
from frontend.router.cost import (
    AloneCosts,
    DecodeCosts,
    PrefillCosts,
    alone_costs,
    decode_costs,
    predicted_alone,
    prefill_costs,
)
from frontend.router.fleet import Fleet
from frontend.router.pairs import Pair, best_pairs, explained
from frontend.router.route import Considered, Fallback, Reason, Route
from slipstream.v1.registry_pb2 import Role

MARGIN_SHARE = 0.2
"""A handoff is given up when it is predicted to cost this share of the time to the first token more than it saves:
predictions are no better than that, and decode workers that compute prompts are what the two pools are to avoid."""

PREFIX_SHARE = 0.5
"""A decode worker that has this share of the prompt computes it alone because of that, by the reason's name."""

SHOWN = 3
"""Choices that are kept to explain a decision."""


def by_time(ask: Ask, fleet: Fleet, now_s: float, *, always_hand_off: bool = False) -> Route:
    """The best pair, or decode alone; `always_hand_off` takes a pair wherever there is one.

    The model has a decode worker that can take the request: `frontend.router.choice` has made sure.
    """
    decode_pool = fleet.pool(ask.model, Role.ROLE_DECODE)
    assert decode_pool, "checked before a policy is asked"
    decodes = decode_costs(ask, decode_pool)
    if ask.prompt_tokens <= 1:
        return _alone(ask, decodes, alone_costs(ask, decodes, now_s), Reason.NOTHING_TO_MOVE, None)
    prefill_pool = fleet.pool(ask.model, Role.ROLE_PREFILL)
    prefills = prefill_costs(ask, prefill_pool, now_s) if prefill_pool else None
    if prefills is None or prefills.usable_s.min() == np.inf:
        return _alone(ask, decodes, alone_costs(ask, decodes, now_s), Reason.DECODE_ALONE, Fallback.NO_PREFILL_WORKER)
    pairs = best_pairs(ask, prefills, decodes)
    alone = alone_costs(ask, decodes, now_s)
    if not pairs:
        return _alone(ask, decodes, alone, Reason.DECODE_ALONE, Fallback.NO_PATH)
    best, row = pairs[0], int(alone.usable_s.argmin())
    if not always_hand_off and _is_worth(ask, prefills, decodes, best, float(alone.usable_s[row])):
        return _alone(ask, decodes, alone, _why_alone(ask, decodes, row), None, pairs, prefills)
    reason = Reason.PREFIX_HIT if prefills.new_tokens(ask, best.prefill) < ask.prompt_tokens else Reason.LEAST_TIME
    considered = [_considered_pair(ask, prefills, decodes, pair) for pair in pairs[:SHOWN]]
    if np.isfinite(alone.usable_s[row]):
        considered.append(_considered_alone(ask, decodes, alone, row))
    return Route(
        decode_pool.members[best.decode].record,
        prefills.pool.members[best.prefill].record,
        reason,
        new_tokens=considered[0].predicted.new_tokens,
        predicted=considered[0].predicted,
        considered=tuple(considered),
    )


def _is_worth(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts, pair: Pair, alone_s: float) -> bool:
    """Whether decode alone is better by more than predictions err."""
    saved_s = pair.ordered_s - alone_s
    return saved_s > 0 and saved_s > MARGIN_SHARE * explained(ask, prefills, decodes, pair).ready_s


def _why_alone(ask: Ask, decodes: DecodeCosts, row: int) -> Reason:
    known = 0.0 if decodes.known is None else float(decodes.known[row])
    return Reason.PREFIX_ON_DECODE if known >= PREFIX_SHARE * ask.prompt_tokens else Reason.HANDOFF_NOT_WORTH_IT


def _alone(
    ask: Ask,
    decodes: DecodeCosts,
    alone: AloneCosts,
    reason: Reason,
    fallback: Fallback | None,
    pairs: list[Pair] | None = None,
    prefills: PrefillCosts | None = None,
) -> Route:
    rows = [int(row) for row in np.argsort(alone.usable_s, kind="stable")[: SHOWN - 1]]
    considered = [_considered_alone(ask, decodes, alone, row) for row in rows if np.isfinite(alone.usable_s[row])]
    if pairs and prefills is not None:
        considered += [_considered_pair(ask, prefills, decodes, pair) for pair in pairs[: SHOWN - 1]]
    decode = decodes.pool.members[rows[0]].record
    predicted = considered[0].predicted
    return Route(decode, None, reason, fallback, predicted.new_tokens, predicted, tuple(considered))


def _considered_pair(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts, pair: Pair) -> Considered:
    prefill, decode = prefills.pool.members[pair.prefill], decodes.pool.members[pair.decode]
    return Considered(prefill.worker_id, decode.worker_id, explained(ask, prefills, decodes, pair))


def _considered_alone(ask: Ask, decodes: DecodeCosts, alone: AloneCosts, row: int) -> Considered:
    return Considered("", decodes.pool.members[row].worker_id, predicted_alone(ask, decodes, alone, row))
