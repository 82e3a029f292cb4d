"""Which cluster a request goes to: a plain function of what is known, with everything passed in.

What is compared is the predicted time to the first token: the round trip, the wait that the cluster's admission and
router predict, and the computation of what it does not have of the prompt. A cached beginning counts for the time it
saves and for nothing else. A conversation's home is a tie-break: of clusters that are about as good, always the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from xxhash import xxh3_64_intdigest

from frontend.clusters.breaker import Health

TOLERANCE_SHARE = 0.1
TOLERANCE_S = 0.01
"""Predictions err: what is within a tenth and ten milliseconds of the best is as good."""

TIE_SHARE = 0.001
"""Equals are taken in another order by each global frontend."""

UNKNOWN_BYTES_PER_TOKEN = 4.0


class Reason(StrEnum):
    """Why this cluster, in a word."""

    LEAST_TIME = "least_time"
    PREFIX_HIT = "prefix_hit"
    SESSION = "session"
    SPILL_OVER = "spill_over"
    FAILOVER = "failover"
    ONLY_ONE = "only_one"
    LAST_RESORT = "last_resort"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        session: what belongs together by the client's word; empty without.
        excluded: frontends that have failed this request.
        avoided: clusters that have refused or failed it: another one goes first.
    """

    prompt_bytes: int
    session: str = ""
    excluded: frozenset[str] = frozenset()
    avoided: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One frontend of one cluster, as it is for one request.

    Attributes:
        room: requests that it can take before its limits; none means full.
        rtt_s: the round trip to it.
        wait_s: in its queue, what was sent there since it last spoke included.
        ready_s: (uncached prompt tokens, seconds to the first token), rising.
        cached_bytes: of the prompt's beginning, that the cluster has.
    """

    endpoint: str
    cluster: str
    health: Health = Health.UP
    room: int = 1
    rtt_s: float = 0.0
    wait_s: float = 0.0
    ready_s: Sequence[tuple[int, float]] = ()
    cached_bytes: int = 0
    bytes_per_token: float = UNKNOWN_BYTES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds; `new_tokens` are those of the prompt that are not cached there."""

    endpoint: str
    cluster: str
    ttft_s: float
    new_tokens: int
    cached_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The decision; `considered` has the chosen one first, then the others by time."""

    predicted: Predicted
    reason: Reason
    considered: tuple[Predicted, ...] = ()


def predict(prompt_bytes: int, one: Candidate) -> Predicted:
    """What a request would meet there."""
    ratio = one.bytes_per_token or UNKNOWN_BYTES_PER_TOKEN
    new_bytes = max(0, prompt_bytes - max(0, one.cached_bytes))
    new_tokens = max(1, round(new_bytes / ratio))
    ttft_s = one.rtt_s + one.wait_s + seconds_for(new_tokens, one.ready_s)
    return Predicted(one.endpoint, one.cluster, ttft_s, new_tokens, min(max(0, one.cached_bytes), prompt_bytes))


def seconds_for(tokens: int, points: Sequence[tuple[int, float]]) -> float:
    """On the line through the points; beyond the last one it goes on as between the last two."""
    if not points:
        return 0.0
    if len(points) == 1:
        return points[0][1]
    right = min(max(1, bisect_right(points, tokens, key=lambda point: point[0])), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    slope = (y1 - y0) / (x1 - x0)
    return max(0.0, y0 + slope * (tokens - x0))


def choose(ask: Ask, candidates: Sequence[Candidate], tie: str = "") -> Choice | None:
    """The frontend to send a request to; None when all there are have failed it.

    Args:
        tie: this global frontend's own name.
    """
    left = [one for one in candidates if one.endpoint not in ask.excluded]
    if not left:
        return None
    rank = min(_rank(ask, one) for one in left)
    usable = [one for one in left if _rank(ask, one) == rank]
    ordered = sorted(((predict(ask.prompt_bytes, one), one) for one in usable), key=lambda pair: _order(pair[0], tie))
    best = ordered[0][0]
    good = [one for one, _ in ordered if one.ttft_s <= best.ttft_s * (1 + TOLERANCE_SHARE) + TOLERANCE_S]
    chosen, home = best, ""
    if ask.session:
        home = home_of(ask.session, sorted({one.cluster for one in candidates}))
        chosen = next((one for one in good if one.cluster == home), best)
    others = [one for one, _ in ordered if one is not chosen]
    return Choice(chosen, _reason(ask, chosen, home, rank, others, candidates), (chosen, *others))


def home_of(session: str, clusters: Sequence[str]) -> str:
    """Rendezvous hashing: all global frontends have the same home for a session, without asking each other."""
    return max(clusters, key=lambda name: xxh3_64_intdigest(f"{session}/{name}".encode()))


def _rank(ask: Ask, one: Candidate) -> tuple[bool, bool, bool]:
    """Lower goes first, whatever the times are."""
    return one.health is Health.DOWN, one.room <= 0, one.cluster in ask.avoided


def _order(one: Predicted, tie: str) -> tuple[float, str]:
    share = xxh3_64_intdigest(f"{tie}/{one.endpoint}".encode()) / 2.0**64
    return one.ttft_s * (1 + TIE_SHARE * share) + TIE_SHARE**2 * share, one.endpoint


def _reason(
    ask: Ask,
    chosen: Predicted,
    home: str,
    rank: tuple[bool, bool, bool],
    others: Sequence[Predicted],
    candidates: Sequence[Candidate],
) -> Reason:
    if rank[0]:
        return Reason.LAST_RESORT
    if ask.excluded or ask.avoided:
        return Reason.FAILOVER
    if len(candidates) == 1:
        return Reason.ONLY_ONE
    if home and chosen.cluster == home:
        return Reason.SESSION
    if home and not any(one.cluster == home for one in others):
        return Reason.SPILL_OVER
    return Reason.PREFIX_HIT if chosen.cached_bytes else Reason.LEAST_TIME
