"""How fast a worker is: its profile as curves over many workers at once, and what experience says of the profile.

A worker without a profile is taken for a typical one until it has shown what it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import numpy as np
from numpy.typing import NDArray

from slipstream.performance import DecodePoint, Predictor, PrefillPoint, Profile

Vector = NDArray[np.float64]

START_TOKENS_PER_S = 2000.0
"""What a worker without a profile is taken to compute before it has computed anything."""

_FAR = 1e9
_FEW = 8


def _typical_step_s(batch: int, context_tokens: int) -> float:
    return 0.020 + batch * (0.2e-3 + 0.5e-6 * context_tokens)


TYPICAL = Profile(
    name="typical",
    model="",
    device="",
    source="assumed, for workers that have no profile: only what they are seen to do counts in the end",
    measured_on="",
    prefill=tuple(PrefillPoint(tokens, tokens / START_TOKENS_PER_S) for tokens in (1, 1000)),
    decode=tuple(
        DecodePoint(batch, context, _typical_step_s(batch, context)) for batch in (1, 64) for context in (1, 8192)
    ),
    block_tokens=16,
    block_bytes=1,
    blocks=1,
    step_tokens=2048,
    max_running=64,
    max_model_len=1 << 20,
    transfer_bytes_per_s=1e9,
    transfer_latency_s=1e-3,
)


@dataclass(frozen=True, slots=True)
class Rest:
    """What computing the rest of a prompt takes, for each depth to which a worker may have it.

    Attributes:
        chunks_s: what its tokens add to steps that run anyway.
        steps: in which it is computed.
    """

    chunks_s: list[float]
    steps: list[int]


class Curve:
    """A predictor's prefill table, for many depths of one prompt at once. The same numbers as `Predictor`."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        points = [0.0, *(float(point.tokens) for point in predictor.profile.prefill), _FAR]
        self._tokens = np.array(points)
        self._seconds = np.array([predictor.chunk_s(tokens, 0.0) for tokens in points])
        self._step_tokens = predictor.profile.step_tokens
        typical = float(min(predictor.profile.step_tokens, 2048))
        self.s_per_token = predictor.chunk_s(typical, 0.0) / typical
        """Of a prompt whose length nobody said."""
        self._last: tuple[int, tuple[int, ...], Rest] = (0, (), Rest([], []))

    def rest(self, prompt_tokens: int, depths: tuple[int, ...]) -> Rest:
        """Of a prompt that is had to these depths."""
        last = self._last
        if last[0] == prompt_tokens and last[1] == depths:
            return last[2]  # both pools of one decision mostly have one curve
        whole_s, step_tokens = self.predictor.chunk_s(prompt_tokens, 0.0), self._step_tokens
        if len(depths) <= _FEW:
            had_s = [self.predictor.chunk_s(one, 0.0) if one else 0.0 for one in depths]
        else:
            had_s = np.interp(depths, self._tokens, self._seconds).tolist()
        rest = Rest(
            [whole_s - one for one in had_s], [math.ceil((prompt_tokens - one) / step_tokens) for one in depths]
        )
        self._last = prompt_tokens, depths, rest
        return rest


@lru_cache(maxsize=256)
def curve_of(profile: Profile) -> Curve:
    """Made once for a profile, however many workers have it."""
    return Curve(Predictor(profile))


COLD_SAMPLES = 2
"""First requests of a worker's life that teach nothing: compilation, empty caches, first connections."""

SETTLED_WEIGHT = 0.1
"""Of a new sample against all before it, once there are many."""

EARLY_SAMPLES = 3
"""Samples that may still be anything: nothing is known to which they could be a surprise."""

MAX_SURPRISE = math.log(4.0)
"""Later a single sample counts as at most four times slower, or faster, than what was expected."""

SAME = math.log(1.02)
"""Corrections that differ by less say the same."""

PROFILED_BOUND = math.log(8.0)
UNPROFILED_BOUND = math.log(1000.0)
"""How far experience may lead away from a profile, and from what a worker without one is taken for."""


@dataclass(slots=True)
class Correction:
    """Observed over predicted, of one quantity of one worker: a decaying mean of logarithms.

    Logarithms, so that twice as slow and twice as fast weigh the same; each sample is clipped (Huber's idea, Robust
    Estimation of a Location Parameter, 1964), so that one request that a garbage collection hit does not count
    for twenty.
    """

    bound: float
    log_factor: float = 0.0
    samples: int = 0

    @property
    def factor(self) -> float:
        """What a prediction of the profile is multiplied with."""
        return math.exp(self.log_factor)

    @property
    def known(self) -> bool:
        """By samples of its own."""
        return self.samples > COLD_SAMPLES

    def start_from(self, others: Sequence[Correction]) -> None:
        """Begin with what others like this one have come to."""
        known = [one.log_factor for one in others if one.known]
        if known and not self.known:
            self.log_factor = median(known)

    def note(self, observed_s: float, predicted_s: float) -> None:
        """A sample: `predicted_s` is what the profile said without this correction."""
        if observed_s <= 0 or predicted_s <= 0:
            return
        self.samples += 1
        if self.samples <= COLD_SAMPLES:
            return
        warm = self.samples - COLD_SAMPLES
        weight, limit = max(SETTLED_WEIGHT, 1.0 / warm), self.bound if warm <= EARLY_SAMPLES else MAX_SURPRISE
        surprise = min(max(math.log(observed_s / predicted_s) - self.log_factor, -limit), limit)
        self.log_factor = min(max(self.log_factor + weight * surprise, -self.bound), self.bound)


def pass_on(corrections: Sequence[Correction]) -> bool:
    """Those of one kind that have not shown themselves follow those that have, where these beat the profile.

    An unproven worker that is thought too slow would never be chosen, and so never prove itself; one that is thought
    too fast is tried and found out. (Optimism in the face of uncertainty: Lai and Robbins, 1985.)

    Returns:
        Whether that says of one anything new.
    """
    known, unknown = [one.log_factor for one in corrections if one.known], [one for one in corrections if not one.known]
    if not known or not unknown:
        return False
    log_factor = min(0.0, median(known))
    changed = any(abs(one.log_factor - log_factor) > SAME for one in unknown)
    if changed:
        for one in unknown:
            one.log_factor = log_factor
    return changed
