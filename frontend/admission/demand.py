"""What a request will cost, before anything of it has run.

The unit is a prompt token's worth of work. This is the simplest predictor that can be fair: lengths, and the mean
answer so far. Anything that knows better (profiles, prefix hits) can stand in for it: see `Demand`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

REQUEST_WORK = 64.0
"""What every request costs besides its tokens, so that a flood of tiny ones is not free."""

ANSWER_WEIGHT = 4.0
"""What a generated token is taken to cost: it is a step of its own, though one shared with a batch."""

FIRST_ANSWER_TOKENS = 128.0
"""The mean answer before there was one."""

DECAY = 0.99
"""What earlier answers weigh in the mean after each newer one."""


@dataclass(frozen=True, slots=True)
class Cost:
    """See `claim.Entry` for the fields."""

    work: float
    prompt_work: float
    kv_tokens: float


class Demand(Protocol):
    """Predicts costs, and learns from what they were."""

    def cost(self, prompt_tokens: int, generated_tokens: int, max_tokens: int | None) -> Cost:
        """Of a request that has `generated_tokens` of its answer already."""
        ...

    def note_answer(self, tokens: int) -> None:
        """An answer came to its end by itself."""
        ...


class MeanDemand:
    """`Demand` from the decaying mean of answers."""

    def __init__(self) -> None:
        self.answer_tokens = FIRST_ANSWER_TOKENS

    def cost(self, prompt_tokens: int, generated_tokens: int, max_tokens: int | None) -> Cost:
        expected = self.answer_tokens
        if max_tokens is not None and max_tokens < expected:
            expected = float(max_tokens)
        remaining = max(1.0, expected - generated_tokens)
        prompt_work = REQUEST_WORK + prompt_tokens + generated_tokens
        return Cost(prompt_work + ANSWER_WEIGHT * remaining, prompt_work, prompt_tokens + generated_tokens + remaining)

    def note_answer(self, tokens: int) -> None:
        self.answer_tokens = DECAY * self.answer_tokens + (1 - DECAY) * tokens
