"""What became of an offered load: goodput, each class's SLO, and how honest Retry-After was. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.offered_load import SLOS
from benchmarks.samples import percentile

ANSWERED, REFUSED, FAILED = "answered", "refused", "failed"


@dataclass(frozen=True, slots=True)
class Try:
    """One try of one request; times from the beginning of the load.

    Attributes:
        number: 0 is the first.
        itl_s: mean time between the tokens of the answer.
        error: what was said of a failed one; the `code` of a refused one.
        retry_after_s: what a refused one was told.
        longest_gap_s: between two reads that brought tokens of a streamed answer.
    """

    request_id: str
    number: int
    service_class: str
    tenant: str
    sent_s: float
    ended_s: float
    outcome: str
    ttft_s: float = 0.0
    itl_s: float = 0.0
    tokens: int = 0
    error: str = ""
    retry_after_s: float = 0.0
    longest_gap_s: float = 0.0
    streamed: bool = True

    @property
    def good(self) -> bool:
        """Answered within the limits of its class, counted from this try on."""
        slo = SLOS[self.service_class]
        return self.outcome == ANSWERED and self.ttft_s <= slo.ttft_s and self.itl_s <= slo.itl_s


@dataclass(frozen=True, slots=True)
class OfClass:
    """One class in the span that counts.

    Attributes:
        good_per_s: answers that ended in the span within their SLO.
        attainment: of the tries that came in the span, those that were answered within the SLO.
        kept: the same, of those that were let in.
    """

    service_class: str
    tries: int
    refused: int
    failed: int
    good_per_s: float
    attainment: float
    kept: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p99_s: float


@dataclass(frozen=True, slots=True)
class Honesty:
    """Of clients that were refused and came back when they were told to.

    Attributes:
        came_back: so many clients.
        at_once: share of them that was let in then.
        within_one_more: share that was let in then, or after one more wait.
        real_over_told: median of the time until they were let in over what they were told first.
        told_p50_s, told_max_s: of all that were refused.
    """

    came_back: int
    at_once: float
    within_one_more: float
    real_over_told: float
    told_p50_s: float
    told_max_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """One load.

    Attributes:
        goodput_per_s: requests that ended in the span within their SLO, each second of it.
        refusals: by code.
        unanswered: tries that neither were answered nor refused: failures.
    """

    times_capacity: float
    offered_per_s: float
    goodput_per_s: float
    classes: list[OfClass]
    refusals: dict[str, int]
    unanswered: int
    honesty: Honesty | None


def result(tries: Sequence[Try], times_capacity: float, offered_per_s: float, begin_s: float, end_s: float) -> Result:
    """Of a load of which only the span from `begin_s` to `end_s` counts."""
    inside = [one for one in tries if begin_s <= one.sent_s < end_s]
    classes = [_of_class(name, tries, inside, begin_s, end_s) for name in SLOS]
    return Result(
        times_capacity,
        offered_per_s,
        sum(one.good_per_s for one in classes),
        classes,
        dict(Counter(one.error for one in tries if one.outcome == REFUSED)),
        sum(one.outcome == FAILED for one in tries),
        honesty(tries),
    )


def _of_class(name: str, tries: Sequence[Try], inside: Sequence[Try], begin_s: float, end_s: float) -> OfClass:
    own = [one for one in inside if one.service_class == name]
    answered = [one for one in own if one.outcome == ANSWERED]
    good = sum(one.good for one in own)
    ended = sum(one.good and one.service_class == name and begin_s <= one.ended_s < end_s for one in tries)
    refused = sum(one.outcome == REFUSED for one in own)
    ttft, itl = [one.ttft_s for one in answered] or [0.0], [one.itl_s for one in answered] or [0.0]
    return OfClass(
        name,
        len(own),
        refused,
        sum(one.outcome == FAILED for one in own),
        ended / (end_s - begin_s),
        good / len(own) if own else 1.0,
        good / max(1, len(own) - refused),
        percentile(ttft, 50),
        percentile(ttft, 99),
        percentile(itl, 99),
    )


def honesty(tries: Iterable[Try]) -> Honesty | None:
    """None where nobody was refused and came back."""
    chains: dict[str, list[Try]] = {}
    for one in tries:
        chains.setdefault(one.request_id, []).append(one)
    told = [one.retry_after_s for chain in chains.values() for one in chain if one.outcome == REFUSED]
    back = [sorted(chain, key=lambda one: one.number) for chain in chains.values() if len(chain) > 1]
    if not back:
        return None
    at_once = sum(chain[1].outcome != REFUSED for chain in back)
    later = sum(len(chain) > 2 and chain[1].outcome == REFUSED and chain[2].outcome != REFUSED for chain in back)
    ratios = [
        (chain[-1].sent_s - chain[0].ended_s) / max(1e-9, chain[0].retry_after_s)
        for chain in back
        if chain[-1].outcome != REFUSED
    ]
    return Honesty(
        len(back),
        at_once / len(back),
        (at_once + later) / len(back),
        median(ratios) if ratios else float("inf"),
        median(told),
        max(told),
    )
