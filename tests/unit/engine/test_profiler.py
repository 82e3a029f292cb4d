"""Profiles are measured through the Engine protocol: here of a simulated engine, whose profile is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.profiler import Facts, Grid, measure
from engine.simulated.engine import SimulatedEngine
from kv_transfer.board import Board
from slipstream.errors import StartupError
from slipstream.performance import Profile, decode_profile, encode_profile
from slipstream.settings import Settings
from slipstream.worker_settings import SimulatedSettings
from tests.unit.engine.simulated.profiles import profile

FACTS = Facts("mine", "m", "simulated", "a test", 16, 1000)
GRID = Grid(prefill=(4, 20, 40, 500), batches=(1, 2, 16), contexts=(8, 16, 500), steps=3, repeats=2)


async def measured(folder: Path, speed: float, grid: Grid = GRID, **sizes: int) -> tuple[Profile, list[str]]:
    board = Board.create(folder, slots=16)
    settings = Settings(simulated=SimulatedSettings(speed=speed))
    engine = SimulatedEngine(settings, profile(**sizes), words=[1, 2, 3], served_name="m", board=board)
    lines: list[str] = []
    async with engine.serving():
        made = await measure(engine, FACTS, grid, lines.append)
    board.close()
    return made, lines


async def test_a_profile_has_what_fits_the_engine(tmp_path: Path) -> None:
    made, lines = await measured(tmp_path, 0.0, blocks=32)
    assert [point.tokens for point in made.prefill] == [4, 20, 40]
    assert [(point.batch, point.context_tokens) for point in made.decode] == [(1, 11), (1, 19), (2, 11), (2, 19)]
    assert (made.blocks, made.block_tokens, made.step_tokens, made.max_model_len) == (32, 4, 16, 60)
    assert made.transfer_bytes_per_s == 1e6
    assert decode_profile(encode_profile(made)) == made
    assert len(lines) == 3 + 4 + 1


async def test_what_is_measured_is_what_the_engine_takes(tmp_path: Path) -> None:
    made, _ = await measured(tmp_path, 1.0)
    assert made.prefill[-1].seconds >= 0.07 * 0.99  # three steps of 0.01 s, and 0.001 s for each of 40 tokens


async def test_an_engine_that_is_too_small_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="too few"):
        await measured(tmp_path, 0.0, Grid(prefill=(200, 300)))
