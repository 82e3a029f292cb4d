"""vLLM's own worker class of this platform, which notes on the board how long the parts of its start took.

vLLM loads it in the engine's process (`worker_cls`), makes one instance there, and calls these methods once each while
it starts; everything else is the base class.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from kv_transfer.board import Board, Counter
from slipstream import lossy_streams

# This is the first of our modules in an engine's process.
lossy_streams.install()

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class TimedWorker(PlatformWorker):
    """See the module's docstring."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with self._timed(Counter.START_WEIGHTS_NS):
            super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        # Where the cache's size is given, this is the run that compiles and warms up.
        with self._timed(Counter.START_WARMUP_NS):
            return int(super().determine_available_memory())

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        with self._timed(Counter.START_KV_CACHE_NS, without=Counter.START_TRANSFER_NS):
            super().initialize_from_config(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        with self._timed(Counter.START_WARMUP_NS):
            return super().compile_or_warm_up_model()

    @contextmanager
    def _timed(self, counter: Counter, *, without: Counter | None = None) -> Iterator[None]:
        """Count the block's nanoseconds, less what it adds to another counter; those of the first rank, for all."""
        if self.rank != 0:
            yield
            return
        board = Board.open(Path(self.vllm_config.kv_transfer_config.get_from_extra_config("board", "")))
        try:
            before_ns = board.counter(without) if without is not None else 0
            began_ns = time.monotonic_ns()
            yield
            inside_ns = board.counter(without) - before_ns if without is not None else 0
            board.add(counter, max(0, time.monotonic_ns() - began_ns - inside_ns))
        finally:
            board.close()
