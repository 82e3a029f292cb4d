"""How far the answers of one engine are from its answers with another KV cache: pure functions of tokens and
probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer.

    Attributes:
        first: log probabilities of the whole vocabulary, by token id, for the first token.
    """

    token_ids: Sequence[int]
    first: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """Answers with a changed cache beside those with the original one, over some prompts.

    Attributes:
        identical_share: answers that are the same from the first token to the last.
        agreement_share: of an answer's tokens, those before the first that differs; mean over the prompts.
        first_token_share: prompts whose first token is the same.
        logprob_delta: mean over the prompts of |difference| in the log probability of the original's first token.
        kl_mean: Kullback-Leibler divergence of the first token's distribution from the original, in nats.
    """

    prompts: int
    tokens: int
    identical_share: float
    agreement_share: float
    first_token_share: float
    logprob_delta: float
    kl_mean: float
    kl_max: float


def difference(originals: Sequence[Answer], changed: Sequence[Answer]) -> Difference:
    """Pairwise; all answers are of one length."""
    pairs = list(zip(originals, changed, strict=True))
    tokens = len(originals[0].token_ids)
    agreeing = [agreeing_tokens(a.token_ids, b.token_ids) for a, b in pairs]
    deltas = [abs(a.first[a.token_ids[0]] - b.first[a.token_ids[0]]) for a, b in pairs]
    divergences = [divergence(a.first, b.first) for a, b in pairs]
    return Difference(
        prompts=len(pairs),
        tokens=tokens,
        identical_share=_mean([count == tokens for count in agreeing]),
        agreement_share=_mean([count / tokens for count in agreeing]),
        first_token_share=_mean([count > 0 for count in agreeing]),
        logprob_delta=_mean(deltas),
        kl_mean=_mean(divergences),
        kl_max=max(divergences),
    )


def agreeing_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))


def divergence(original: Mapping[int, float], changed: Mapping[int, float]) -> float:
    """KL(original || changed) in nats, of log probabilities by token id."""
    return math.fsum(math.exp(logprob) * (logprob - changed[token]) for token, logprob in original.items())


def break_even_bytes_per_s(wire_share: float, encode_bytes_per_s: float, decode_bytes_per_s: float) -> float:
    """The link's speed below which blocks arrive sooner when they are quantized: encoded, sent, decoded, one
    after the other. Speeds are in bytes of KV; `wire_share` is encoded bytes by KV bytes."""
    return (1 - wire_share) / (1 / encode_bytes_per_s + 1 / decode_bytes_per_s)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
