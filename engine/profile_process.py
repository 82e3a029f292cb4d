"""The process behind `slipstream profile`: starts a vLLM engine as a worker would, measures it, ends it."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from engine import environment
from engine.cpu_clock import cpu_seconds
from engine.profiler import Facts, Grid, Say, measure
from kv_transfer.board import Board
from slipstream import telemetry
from slipstream.errors import ConfigError
from slipstream.model_folder import resolve
from slipstream.performance import Profile
from slipstream.settings import Settings


def run(settings: Settings, *, name: str, source: str, grid: Grid, say: Say, cpu_clock: bool = False) -> Profile:
    """Measure.

    Args:
        name: of the profile. source: how it came to be, for whoever reads it.
        cpu_clock: by the CPU time of the engine's processes, not by the wall's.

    Raises:
        ConfigError: it would be on several nodes.
        StartupError: the engine cannot be loaded, or is too small to be measured.
    """
    if settings.worker.nnodes > 1:
        raise ConfigError(
            f"worker.nnodes = {settings.worker.nnodes}: `slipstream profile` measures an engine on one node",
            param="worker.nnodes",
        )
    environment.prepare(settings, os.environ)
    telemetry.configure(settings.log, component="profile")
    return uvloop.run(_run(settings, name, source, grid, say, cpu_seconds if cpu_clock else time.monotonic))


async def _run(settings: Settings, name: str, source: str, grid: Grid, say: Say, clock: Callable[[], float]) -> Profile:
    from engine.vllm_engine import VllmEngine  # late: the import takes seconds, and needs the environment

    folder = resolve(settings.model)
    served = settings.served_model_name or folder.served_name
    with tempfile.TemporaryDirectory(prefix="slipstream-profile-") as scratch:
        board = Board.create(Path(scratch), slots=settings.transfer.board_slots)
        try:
            engine = VllmEngine(settings, model_path=folder.path, served_name=served, board=board)
            await asyncio.to_thread(engine.start)
            try:
                ranks = settings.worker.tensor_parallel_size
                threads = settings.worker.threads or len(os.sched_getaffinity(0))
                where = (
                    f"cpu, {threads} thread{'s' if threads > 1 else ''}" if engine.device == "cpu" else engine.device
                )
                facts = Facts(name, served, where, source, engine.step_tokens, engine.vocabulary, ranks)
                return await measure(engine, facts, grid, say, clock)
            finally:
                await asyncio.to_thread(engine.shutdown)
        finally:
            board.unlink()
            board.close()
