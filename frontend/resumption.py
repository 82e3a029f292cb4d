"""How an answer goes on at another worker so that it stays the answer that it was: what the next worker is sent.

Mostly the prompt and what was generated, as a prompt: what is sampled next depends on nothing else. Three things do not
follow from the tokens alone. Presence and frequency penalties count what was generated, which for the next worker is
prompt; a seed's random numbers have been drawn up to here. Where the answer can be made again from its beginning it is,
unseen, up to where the client is. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from slipstream.v1.sampling_pb2 import SamplingParams

_SEEDS = 1 << 62
_ODD = 0x9E3779B97F4A7C15  # two seeds of neighbours have nothing in common


class Way(StrEnum):
    """CONTINUED: from prompt and tokens, as if nothing had happened. REPLAYED: generated again from the prompt, and
    compared with what was sent. APPROXIMATED: continued although the next tokens may be others than they would have
    been; each is still one that the request's sampling allows.
    """

    CONTINUED = "continued"
    REPLAYED = "replayed"
    APPROXIMATED = "approximated"


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether the most likely token is always taken."""
    return sampling.HasField("temperature") and sampling.temperature == 0


def continuable(sampling: SamplingParams) -> bool:
    """Whether a worker that takes the tokens so far for a prompt goes on as the first one would have."""
    if sampling.HasField("seed") and not is_greedy(sampling):
        return False
    if sampling.presence_penalty:
        return False
    # The repetition penalty looks at prompt and answer alike. It scales, so that what is added before it is not what
    # is added after it; without it a frequency penalty of what was generated is a bias.
    return not sampling.frequency_penalty or not _repetition(sampling)


def way(sampling: SamplingParams, *, reproducible: bool) -> Way:
    """How an answer that has begun goes on.

    Args:
        reproducible: False where a replay has already come to other tokens.
    """
    if continuable(sampling):
        return Way.CONTINUED
    if reproducible and (sampling.HasField("seed") or is_greedy(sampling)):
        return Way.REPLAYED
    return Way.APPROXIMATED


def rest_of(sampling: SamplingParams, generated: Sequence[int]) -> SamplingParams:
    """What is asked of a worker that gets `generated` as the end of its prompt."""
    rest = SamplingParams()
    rest.CopyFrom(sampling)
    if sampling.HasField("max_tokens"):
        rest.max_tokens = max(0, sampling.max_tokens - len(generated))
    if sampling.HasField("min_tokens"):
        rest.min_tokens = max(0, sampling.min_tokens - len(generated))
    if sampling.HasField("seed"):
        rest.seed = (sampling.seed + len(generated) * _ODD) % _SEEDS
    for token, bias in _biases(sampling, generated):
        rest.logit_bias[token] += bias
    return rest


def _biases(sampling: SamplingParams, generated: Sequence[int]) -> list[tuple[int, float]]:
    """What the penalties take from tokens that the next worker does not count."""
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    if not frequency and not presence:
        return []
    return [(token, -(frequency * count + presence)) for token, count in Counter(generated).items()]


def _repetition(sampling: SamplingParams) -> bool:
    return sampling.HasField("repetition_penalty") and sampling.repetition_penalty != 1
