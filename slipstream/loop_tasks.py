"""How many tasks a process' event loop has: what is begun and never ends shows here first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class LoopTasks(Collector):
    """The figure as a metric. May be read from any thread.

    Args:
        labels: names and values.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, labels: Sequence[tuple[str, str]] = ()) -> None:
        self._loop = loop
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "slipstream_event_loop_tasks",
            "Tasks that have begun and not ended in this process' event loop. They follow its open requests and "
            "connections; a rise without one is a leak.",
            labels=[name for name, _ in self._labels],
        )
        family.add_metric([value for _, value in self._labels], len(asyncio.all_tasks(self._loop)))
        yield family


@contextmanager
def tasks_shown(registry: CollectorRegistry) -> Iterator[None]:
    """Tell of the running loop while the block runs."""
    tasks = LoopTasks(asyncio.get_running_loop())
    registry.register(tasks)
    try:
        yield
    finally:
        registry.unregister(tasks)
