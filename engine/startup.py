"""How long each part of a worker's start took: what a cold start is made of, and where to begin when it is too long.

The phases follow one another, apart from `registration` and `path_test`, which happen beside the rest; `total` is from
the start of the process until it takes requests. What happens in the engine's own process is timed there
(`engine.timed_worker`) and comes over the board.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import psutil
from prometheus_client.core import GaugeMetricFamily, Metric

from kv_transfer.board import Board, Counter
from slipstream.v1.registry_pb2 import Startup as StartupMessage

PHASES: Final = tuple(field.name for field in StartupMessage.DESCRIPTOR.fields)
"""Their names, in the order in which they happen; what each is stands in registry.proto."""
_OF_THE_ENGINE: Final = {
    "weights": Counter.START_WEIGHTS_NS,
    "kv_cache": Counter.START_KV_CACHE_NS,
    "transfer": Counter.START_TRANSFER_NS,
    "warmup": Counter.START_WARMUP_NS,
}


class Startup:
    """The phases that are over, in seconds.

    Args:
        age_s: how old this process is now; what it was busy with so far is taken for imports.
    """

    def __init__(self, age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock() - age_s
        self.seconds: dict[str, float] = {"imports": age_s}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        began_s = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began_s

    def engine_loaded(self, board: Board) -> None:
        """Take what the engine's process has timed out of the phase `engine`, which had all of it."""
        inside = {name: board.counter(word) / 1e9 for name, word in _OF_THE_ENGINE.items() if board.counter(word)}
        self.seconds |= inside
        self.seconds["engine"] = max(0.0, self.seconds.get("engine", 0.0) - sum(inside.values()))

    def ready(self) -> None:
        """The worker takes requests."""
        self.seconds["total"] = self._clock() - self._began_s

    def since_start_s(self) -> float:
        return self._clock() - self._began_s

    def message(self) -> StartupMessage:
        """For the registry."""
        return StartupMessage(**self.seconds)


class StartupCollector:
    """The phases as a metric."""

    def __init__(self, startup: Startup, labels: Callable[[], tuple[str, str]]) -> None:
        self._startup = startup
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "slipstream_worker_startup_seconds",
            "What this worker's start was made of, by phase; `total` is what a planner has to plan ahead. Weights the "
            "longest part: prefetch the model, or stream it (worker.load_format). Model: keep a cache on local disk.",
            labels=("role", "worker", "phase"),
        )
        for name in PHASES:
            if name in self._startup.seconds:
                family.add_metric((*self._labels(), name), self._startup.seconds[name])
        yield family


def process_age_s() -> float:
    """How long ago this process was started."""
    return max(0.0, time.time() - psutil.Process().create_time())
