"""Choices near and beyond what a whole budget can do: the split that answers most, and no way back and forth."""

from __future__ import annotations

import msgspec
import pytest

from planner.capacity import DecodeBatch, Pair, PrefillQueue
from planner.choose import PoolAsk, best_within, unbarred
from planner.demand import Demand
from planner.objectives import Bounds, Objective
from planner.pool_model import Asked, PoolModel
from planner.scaling import Counts
from slipstream.performance import Profile
from tests.unit.planner.plant import packaged

BUDGET = 8
CHATS = Demand(12.9, 1161.0, 257.0, input_variation=0.85, burstiness=2.0)
"""Like Azure's conversations, at a rate at which one `small` decode worker collapses in a simulation."""


def small() -> Profile:
    """Little room for KV, and prompts that take long: Qwen3-32B on an H20."""
    base = packaged("qwen3-32b-h200-tp1")
    prefill = tuple(msgspec.structs.replace(one, seconds=one.seconds * 6.7) for one in base.prefill)
    decode = tuple(msgspec.structs.replace(one, seconds=one.seconds * 1.2) for one in base.decode)
    return msgspec.structs.replace(base, prefill=prefill, decode=decode, blocks=11_834)


PAIR = Pair.of(small())


def ask(rate: float, now: Counts, clearing: float = 0.0) -> PoolAsk:
    pool = PoolModel(PAIR, [Asked(CHATS.at(rate), Objective(6.0, 0.05))], clearing=clearing)
    return PoolAsk("m", pool, Counts(1, 1), Bounds(), now=now)


@pytest.mark.parametrize("rate", [12.9, 13.7, 14.5])
@pytest.mark.parametrize("now", [Counts(5, 3), Counts(7, 1), Counts(6, 2)])
def test_beyond_saturation_decode_keeps_room_for_all_that_prefill_sends(rate: float, now: Counts) -> None:
    assert best_within(ask(rate, now), BUDGET) == Counts(6, 2)


def test_what_has_waited_comes_to_decode_as_well() -> None:
    calm, busy = ask(9.0, Counts(6, 2)).pool, ask(9.0, Counts(6, 2), clearing=3.0).pool
    assert calm.decode_meets(1)
    assert not busy.decode_meets(1)
    assert busy.decode_meets(2)


def test_long_prompts_need_more_room_than_their_number_tells() -> None:
    even = DecodeBatch(Demand(12.9, 1161.0, 257.0, input_variation=0.0), PAIR.decode)
    uneven = DecodeBatch(Demand(12.9, 1161.0, 257.0, input_variation=2.0), PAIR.decode)
    assert even.running(1) == uneven.running(1)
    assert uneven.fits(1) < even.fits(1)
    assert even.under(0.5).fits(1) > even.fits(1)


def test_a_queue_a_little_beyond_saturation_is_late_only_after_a_while() -> None:
    queue = PrefillQueue(CHATS, PAIR.prefill)
    workers = int(queue.offered)
    shares = [queue.lasting(workers - fewer, 6.0) for fewer in range(4)]
    assert queue.within(workers, 6.0) < 0.1 < 0.5 < shares[0]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.2


def test_a_split_of_the_whole_budget_is_left_only_for_one_that_is_clearly_better() -> None:
    # 7P1D is enough by the formulas at this rate, and so nearly is 6P2D.
    assert unbarred(ask(12.0, Counts(6, 2)), Counts(7, 1), Counts(0, 0), BUDGET) == Counts(6, 2)
    assert unbarred(ask(13.0, Counts(5, 3)), Counts(6, 2), Counts(0, 0), BUDGET) == Counts(6, 2)


def test_what_was_left_as_too_few_is_not_tried_again_for_a_little() -> None:
    again = ask(10.2, Counts(5, 2))
    assert unbarred(again, Counts(6, 1), Counts(0, 0), BUDGET) == Counts(6, 1), "nothing was tried, GPUs are free"
    assert unbarred(again, Counts(6, 1), Counts(0, 2), BUDGET) == Counts(5, 2)


def test_a_pool_below_its_floor_is_repaired_whatever_was_tried() -> None:
    below = PoolAsk("m", ask(12.0, Counts(1, 7)).pool, Counts(5, 1), Bounds(), now=Counts(1, 7))
    assert unbarred(below, Counts(5, 3), Counts(5, 7), BUDGET) == Counts(5, 3)
