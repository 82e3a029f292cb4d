"""The figures that a process tells on its /metrics page."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Page:
    """Attributes:
    samples: name, labels and value of each.
    """

    samples: tuple[tuple[str, Mapping[str, str], float], ...]

    def total(self, name: str, **labels: str) -> float:
        """Sum over all samples of that name with these labels."""
        return sum(
            value
            for found, has, value in self.samples
            if found == name and all(has.get(key) == wanted for key, wanted in labels.items())
        )

    def has(self, name: str) -> bool:
        return any(found == name for found, _, _ in self.samples)


def page(url: str) -> Page | None:
    """What is there now; None when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            text = response.read().decode()
    except OSError:
        return None
    families = text_string_to_metric_families(text)
    return Page(tuple((one.name, one.labels, one.value) for family in families for one in family.samples))
