"""What is remembered of the last requests, by request id: bounded, the oldest forgotten first. Plain data."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")

KEPT = 2048
"""Requests remembered of each kind."""


class LastRequests(Generic[T]):
    """Things by the request they are about, several of each."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._by_id: OrderedDict[str, list[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request_id: str, one: T) -> list[T]:
        """Remember one more of a request; returns all of it."""
        same = self._by_id.setdefault(request_id, [])
        same.append(one)
        while len(self._by_id) > self._kept:
            self._by_id.popitem(last=False)
        return same

    def forget(self, request_id: str) -> None:
        """Nothing is remembered of this request any more."""
        self._by_id.pop(request_id, None)

    def exact(self, request_id: str) -> list[T]:
        """Of this very id."""
        return self._by_id.get(request_id, [])

    def of(self, request_id: str) -> list[T]:
        """Of a request by the id in the frontend's logs, or by the one that its client gave: also where that was made
        unique, stands for several answers, or was sent again after a pause. Looks at all that is kept."""
        start = f"{request_id}-"
        named = (each for name, each in self._by_id.items() if name == request_id or name.startswith(start))
        return [one for each in named for one in each]
