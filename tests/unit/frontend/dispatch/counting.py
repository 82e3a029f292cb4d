"""What counters of this process have counted meanwhile."""

from __future__ import annotations

from prometheus_client import REGISTRY


class Counting:
    """How much a counter grew since this was made."""

    def __init__(self, name: str, **labels: str) -> None:
        self._name, self._labels = name, labels
        self._before = self._value()

    def grown(self) -> float:
        return self._value() - self._before

    def _value(self) -> float:
        return REGISTRY.get_sample_value(self._name, self._labels) or 0.0


def fallbacks(reason: str) -> Counting:
    return Counting("slipstream_frontend_fallbacks_total", reason=reason)
