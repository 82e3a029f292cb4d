"""When each worker's engine was last seen to compute, so that one that has stopped is not waited for.

A frozen engine keeps its connections, and its service goes on renewing its registration. What it does not do is fill
blocks: a worker's cache feed tells of those as they are filled, also in the middle of a long prompt. Plain data.
"""

from __future__ import annotations


class SignsOfLife:
    """Of the workers that tell what they cache; the others show none, whatever they do."""

    def __init__(self) -> None:
        self._last_s: dict[str, float] = {}

    def begins(self, worker_id: str, now_s: float) -> None:
        """It is one of those that tell."""
        self._last_s.setdefault(worker_id, now_s)

    def computed(self, worker_id: str, now_s: float) -> None:
        """It has filled blocks, or computed a prompt."""
        if worker_id in self._last_s:
            self._last_s[worker_id] = now_s

    def forget(self, worker_id: str) -> None:
        """It is gone, or does not tell any more."""
        self._last_s.pop(worker_id, None)

    def last_s(self, worker_id: str) -> float | None:
        """When it was last seen to compute; None for one that does not tell."""
        return self._last_s.get(worker_id)
