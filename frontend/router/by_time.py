"""The default policy, `kv`: the choice that is predicted to make everybody wait the least.

What a worker has of the prompt already makes its computation shorter and nothing else, so a prefix counts for exactly
what it saves: a common system prompt does not draw all requests to one worker once its queue outweighs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frontend.router.ask import Ask
from frontend.router.cost import (
    AloneCosts,
    DecodeCosts,
    Pair,
    PrefillCosts,
    alone_costs,
    decode_costs,
    predicted_alone,
    predicted_pair,
    prefill_costs,
)
from frontend.router.fleet import Fleet
from frontend.router.pairs import SHOWN, best_pairs, least
from frontend.router.route import Considered, Fallback, Reason, Route
from slipstream.v1.registry_pb2 import Role

MARGIN_SHARE = 0.2
"""A handoff is given up when it is predicted to cost this share of the time to the first token more than it saves:
predictions are no better than that, and decode workers that compute prompts are what the two pools are to avoid."""

PREFIX_SHARE = 0.5
"""A decode worker that has this share of the prompt computes it alone because of that, by the reason's name."""


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
    if prefills is None or prefills.usable_s[prefills.usable_s.argmin()] == np.inf:
        return _alone(ask, decodes, alone_costs(ask, decodes, now_s), Reason.DECODE_ALONE, Fallback.NO_PREFILL_WORKER)
    pairs = best_pairs(ask, prefills, decodes)
    alone = alone_costs(ask, decodes, now_s)
    if not pairs:
        return _alone(ask, decodes, alone, Reason.DECODE_ALONE, Fallback.NO_PATH)
    row = int(alone.usable_s.argmin())
    considered = [_considered_pair(ask, prefills, decodes, pair) for pair in pairs]
    best, alone_s = considered[0].predicted, alone.usable_s.item(row)
    # Decode alone has to be better by more than predictions err.
    if not always_hand_off and pairs[0].ordered_s - alone_s > MARGIN_SHARE * best.ready_s:
        return _alone(ask, decodes, alone, _why_alone(ask, decodes, row), None, considered)
    if alone_s < np.inf:
        considered.append(_considered_alone(ask, alone, row))
    return Route(
        decode_pool.members[pairs[0].decode].record,
        prefills.pool.members[pairs[0].prefill].record,
        Reason.PREFIX_HIT if best.new_tokens < ask.prompt_tokens else Reason.LEAST_TIME,
        None,
        best.new_tokens,
        best,
        tuple(considered),
    )


def _why_alone(ask: Ask, decodes: DecodeCosts, row: int) -> Reason:
    is_known = decodes.rests.known(row) >= PREFIX_SHARE * ask.prompt_tokens
    return Reason.PREFIX_ON_DECODE if is_known else Reason.HANDOFF_NOT_WORTH_IT


def _alone(
    ask: Ask,
    decodes: DecodeCosts,
    alone: AloneCosts,
    reason: Reason,
    fallback: Fallback | None,
    others: Sequence[Considered] = (),
) -> Route:
    rows = least(alone.usable_s)[: SHOWN - 1]
    considered = [_considered_alone(ask, alone, row) for row in rows]
    predicted = considered[0].predicted
    decode = decodes.pool.members[rows[0]].record
    considered += others[: SHOWN - 1]
    return Route(decode, None, reason, fallback, predicted.new_tokens, predicted, tuple(considered))


def _considered_pair(ask: Ask, prefills: PrefillCosts, decodes: DecodeCosts, pair: Pair) -> Considered:
    prefill, decode = prefills.pool.members[pair.prefill], decodes.pool.members[pair.decode]
    return Considered(prefill.worker_id, decode.worker_id, predicted_pair(ask, prefills, decodes, pair))


def _considered_alone(ask: Ask, alone: AloneCosts, row: int) -> Considered:
    return Considered("", alone.decodes.pool.members[row].worker_id, predicted_alone(ask, alone, row))
