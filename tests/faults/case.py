"""What a case of the fault table is, and what is measured in it: plain data, judged by a pure function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from tests.faults.arena import Arena
    from tests.faults.load import Load


@dataclass(frozen=True, slots=True)
class Promise:
    """In numbers. A wrong token, an error without a type, a hang and anything kept are never promised to anybody.

    Attributes:
        silence_s: longest wait of a client for its first token or its next one. The suite's deadlines are short (see
            `tests.support.fault_cluster`); this is their sum with room for a machine that does other things too.
        lost: requests that may end with an error, which is one of `slipstream.errors`.
        words: the same for people.
    """

    words: str
    silence_s: float
    lost: int = 0


class Measured(msgspec.Struct, kw_only=True):
    """What came of a case.

    Attributes:
        lost: requests that ended with a typed error; `codes` says which.
        wrong: answers with another token than a plain engine's, too short or too long.
        untyped: requests that ended with something else than a typed error.
        hung: requests that had not ended when every deadline had passed.
        moved: answers that more than one worker took part in, or that decode computed alone.
        silence_s: the longest that a client waited for its first token or the next one.
        quiet_s: after the last request, until nothing was held anywhere.
        kept: what still was, when that took too long.
        broken: what else was promised and did not come, in words.
        figures: of this case alone.
    """

    requests: int = 0
    answered: int = 0
    lost: int = 0
    wrong: int = 0
    untyped: int = 0
    hung: int = 0
    moved: int = 0
    silence_s: float = 0.0
    quiet_s: float = 0.0
    codes: dict[str, int] = {}
    kept: list[str] = []
    broken: list[str] = []
    figures: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class Stream:
    """What clients do meanwhile.

    Attributes:
        at_once: streams that are open at the same time; each is followed by the next.
        tokens: of an answer.
    """

    at_once: int = 6
    tokens: int = 96


Inflict = Callable[["Arena", "Load"], Awaitable[None]]
Alone = Callable[["Arena"], Awaitable[Measured]]


def possible() -> str:
    """There is nothing in the way of a case."""
    return ""


@dataclass(frozen=True, slots=True)
class Case:
    """One row.

    Attributes:
        name: as it is asked for on the command line.
        fault: kind of fault, the heading under which the row stands.
        what: is done, in words.
        inflict: does it, while clients stream; None for a case that is `alone`.
        alone: does it all, with clients of its own, and says what it measured.
        short: belongs to the selection that runs with the tests.
        why_not: why it cannot run here; empty when it can.
    """

    name: str
    fault: str
    what: str
    promise: Promise
    inflict: Inflict | None = None
    alone: Alone | None = None
    stream: Stream = field(default_factory=Stream)
    short: bool = False
    why_not: Callable[[], str] = possible


def broken(promise: Promise, measured: Measured) -> list[str]:
    """What was promised and did not hold; empty when all did."""
    found = [f"{count} {what}" for count, what in _never(measured) if count]
    if measured.lost > promise.lost:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(measured.codes.items()))
        found.append(f"{measured.lost} requests lost ({codes}), at most {promise.lost} promised")
    if measured.silence_s > promise.silence_s:
        found.append(f"a client waited {measured.silence_s:.1f} s, at most {promise.silence_s:g} s promised")
    if not measured.requests:
        found.append("nothing was asked")
    return [*found, *measured.kept, *measured.broken]


def _never(measured: Measured) -> list[tuple[int, str]]:
    return [(measured.wrong, "wrong answers"), (measured.untyped, "untyped errors"), (measured.hung, "requests hung")]
