"""What the router is asked: one request, as far as the choice of its workers depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from frontend.depths import Depths


@dataclass(frozen=True, slots=True)
class Ask:
    """What the router needs to know of a request.

    Attributes:
        max_tokens: tokens to generate at most; 0 when unknown.
        excluded: workers that already failed this request.
        known: by worker id, tokens of the prompt's beginning whose KV blocks the worker has.
        known_by_slot: the same by `Candidate.slot`, where an index has it so; `known` is then not looked at. Shorter
            than the fleet is fine: the rest has nothing.
        suspects: workers that a call failed to reach a moment ago.
        session: what belongs together by a client's word; empty without.
        expected_tokens: tokens that the answer is likely to have; 0 when nobody knows.
    """

    model: str
    prompt_tokens: int
    max_tokens: int = 0
    excluded: AbstractSet[str] = frozenset()
    known: Mapping[str, int] = field(default_factory=dict)
    known_by_slot: Depths | None = field(default=None, compare=False)
    suspects: AbstractSet[str] = frozenset()
    session: str = ""
    expected_tokens: float = 0.0
