"""From a target to actions: which of them, and which have to wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.observation import WorkerSeen
from planner.scaling import Counts, Drain, Flip
from planner.steps import Limits, steps
from slipstream.v1.registry_pb2 import Role, WorkerState

READY, STARTING = WorkerState.READY, WorkerState.STARTING
PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE
NO_LIMITS = Limits(gpus=16, gpus_each=(1, 1), room=Counts(16, 16), ups=8, downs=8, flips=8, actions=16)


def pool(role: Role.ValueType, ready: int, starting: int = 0) -> list[WorkerSeen]:
    states = [READY] * ready + [STARTING] * starting
    return [WorkerSeen(f"{role}-{number}", "m", role, state, 0.0) for number, state in enumerate(states)]


@pytest.mark.parametrize(("ready", "starting", "flips"), [(1, 2, 0), (2, 1, 1), (2, 2, 1), (3, 0, 1)])
def test_the_last_ready_worker_of_a_role_is_not_flipped_while_others_only_start(
    ready: int, starting: int, flips: int
) -> None:
    workers = [*pool(PREFILL, 1), *pool(DECODE, ready, starting)]
    actions, held = steps("m", workers, Counts(0, 0), Counts(2, ready + starting - 1), NO_LIMITS)
    assert [type(one) for one in actions] == [Flip] * flips
    assert held == ("" if flips else "flip")


def test_a_role_of_which_nobody_is_wanted_gives_its_last_one() -> None:
    actions, _ = steps("m", pool(DECODE, 1), Counts(0, 0), Counts(1, 0), NO_LIMITS)
    assert actions == [Flip(f"{DECODE}-0", PREFILL)]


@given(st.tuples(*[st.integers(0, 4)] * 4), st.integers(1, 6), st.integers(1, 6))
def test_who_serves_a_role_goes_on_until_another_one_does(
    there: tuple[int, int, int, int], prefill: int, decode: int
) -> None:
    workers = [*pool(PREFILL, there[0], there[1]), *pool(DECODE, there[2], there[3])]
    actions, _ = steps("m", workers, Counts(0, 0), Counts(prefill, decode), NO_LIMITS)
    leaving = {one.worker_id for one in actions if isinstance(one, Flip | Drain)}
    for role in (PREFILL, DECODE):
        ready = {one.worker_id for one in workers if one.role == role and one.state == READY}
        assert not ready or ready - leaving
