"""Whether an engine that has requests still takes steps. Plain data, with the time passed in.

An engine core that is frozen (a stopped process, a GPU kernel that never returns) keeps its connections, and its
service goes on answering. What it does not do is begin another step: while it has requests, even such that only wait
for their blocks, its scheduler runs a thousand times a second, or as often as the model's steps end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

MOST_BETWEEN_LOOKS_S: Final = 1.0
"""A look that comes later than this after the one before counts as this much: it was the service itself that stood
still, and for how long its engine did so too nobody knows."""

TOKEN_S: Final = {"cpu": 0.05, "cuda": 0.002}
"""What one token of a step may take, on the slowest machine of the kind that anybody should use."""


class Stall(Enum):
    """How an engine stands."""

    NONE = "none"
    SILENT = "silent"  # its requests had better go elsewhere
    HUNG = "hung"  # it will not come back


@dataclass(slots=True)
class StepWatch:
    """Args:
    silence_s: after which an engine counts as silent, with `token_s` for each token of its step on top.
    hang_s: after which it counts as hung.
    """

    silence_s: float
    hang_s: float
    token_s: float
    _steps: int = -1
    _looked_s: float = 0.0
    _silent_s: float = 0.0
    _stall: Stall = field(default=Stall.NONE)

    @property
    def silent_s(self) -> float:
        """For how long it has been seen to take no step although it had requests."""
        return self._silent_s

    def look(self, steps: int, step_tokens: int, *, busy: bool, now_s: float) -> Stall:
        """Call it often, in order of time.

        Args:
            steps: begun so far. step_tokens: of the one that runs.
            busy: whether the engine has anything to do. Requests that leave it do not make it well: it is silent until
                it takes a step, whether or not it has others.
        """
        passed_s, self._looked_s = min(max(0.0, now_s - self._looked_s), MOST_BETWEEN_LOOKS_S), now_s
        if steps != self._steps:
            self._steps, self._silent_s, self._stall = steps, 0.0, Stall.NONE
            return self._stall
        if not busy and self._stall is Stall.NONE:
            return self._stall
        self._silent_s += passed_s
        allowed_s = step_tokens * self.token_s
        if self._silent_s >= self.hang_s + allowed_s:
            self._stall = Stall.HUNG
        elif self._silent_s >= self.silence_s + allowed_s:
            self._stall = Stall.SILENT
        return self._stall
