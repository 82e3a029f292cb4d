"""What a worker's start was made of: phases that add up, told in one order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.startup import PHASES, Startup, StartupCollector, process_age_s
from kv_transfer.board import Board, Counter


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board.create(tmp_path, slots=16)
    yield board
    board.close()


def test_the_engines_own_phases_are_taken_out_of_the_wait_for_it(clock: Clock, board: Board) -> None:
    startup = Startup(3.0, clock)
    with startup.phase("model"):
        clock.now_s += 2.0
    with startup.phase("imports"):
        clock.now_s += 1.5
    with startup.phase("engine"):
        clock.now_s += 20.0
    board.add(Counter.START_WEIGHTS_NS, int(9e9))
    board.add(Counter.START_KV_CACHE_NS, int(1e9))
    board.add(Counter.START_WARMUP_NS, int(4e9))
    board.add(Counter.START_WARMUP_NS, int(2e9))
    startup.engine_loaded(board)
    clock.now_s += 0.5
    startup.ready()

    told = {phase.name: seconds for phase, seconds in startup.message().ListFields()}
    assert told == {
        "imports": 4.5,
        "model": 2.0,
        "engine": 4.0,
        "weights": 9.0,
        "kv_cache": 1.0,
        "warmup": 6.0,
        "total": 27.0,
    }
    assert list(told) == [name for name in PHASES if name in told]


def test_an_engine_that_times_nothing_keeps_its_whole_wait(clock: Clock, board: Board) -> None:
    startup = Startup(0.0, clock)
    with startup.phase("engine"):
        clock.now_s += 2.0
    startup.engine_loaded(board)

    assert startup.seconds == {"imports": 0.0, "engine": 2.0}


def test_a_phase_that_failed_has_its_time_too(clock: Clock) -> None:
    startup = Startup(0.0, clock)

    def fail() -> None:
        with startup.phase("model"):
            clock.now_s += 7.0
            raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        fail()
    assert startup.seconds["model"] == 7.0


def test_the_phases_are_a_metric_with_the_role_of_now(clock: Clock) -> None:
    startup = Startup(1.0, clock)
    startup.ready()
    [family] = StartupCollector(startup, lambda: ("decode", "d0")).collect()

    assert {sample.labels["phase"]: sample.value for sample in family.samples} == {"imports": 1.0, "total": 1.0}
    assert {(sample.labels["role"], sample.labels["worker"]) for sample in family.samples} == {("decode", "d0")}


def test_a_process_knows_how_old_it_is() -> None:
    assert 0.0 < process_age_s() < 86400
