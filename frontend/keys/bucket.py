"""Token buckets as plain arithmetic: how full one is, when it has room, what a charge makes of it.

A bucket holds `capacity` and fills by `per_s`. All of its state is one number, the time at which it will be full again
(the "theoretical arrival time" of the GCRA, ATM Forum 1996): so that it is cheap, has no timer, and fits into memory
that processes share.

What an answer will cost is not known before its end. So its most is *held* while it runs, and what it really was is
charged at its end: what is held cannot be had by others, and is not gone. Refunding a charge instead would let a client
save up: what a bucket had refilled meanwhile would be given twice. Over any time W no more is charged than
`capacity + per_s * W`, but for what one request costs beyond what was held for it; that is a debt, for which later
ones wait.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """What may be had: `per_s`, and up to `capacity` at once."""

    per_s: float
    capacity: float

    @property
    def fills_in_s(self) -> float:
        """From empty to full. What is held longer than that is charged as it is: see `ledger`."""
        return self.capacity / self.per_s

    @property
    def slack(self) -> float:
        """Below what anybody counts, and above what floating-point numbers err by."""
        return 1e-6 * max(1.0, self.capacity)


def level(rate: Rate, full_at_s: float, now_s: float) -> float:
    """What is in it; less than 0 while a debt is paid."""
    return rate.capacity - max(0.0, full_at_s - now_s) * rate.per_s


def charged(rate: Rate, full_at_s: float, amount: float, now_s: float) -> float:
    """`full_at_s` after a charge."""
    return max(full_at_s, now_s) + amount / rate.per_s


def given_back(rate: Rate, full_at_s: float, amount: float, charged_s: float, now_s: float) -> float:
    """`full_at_s` after a charge was for nothing: less what the bucket refilled since, which would be given twice."""
    return full_at_s - max(0.0, amount / rate.per_s - (now_s - charged_s))


def room_in_s(
    rate: Rate, full_at_s: float, amount: float, now_s: float, *, held: float = 0.0, last_held_s: float = 0.0
) -> float:
    """Seconds until `amount` can be had; 0: now. It can be by then if nobody else takes anything meanwhile.

    More than the whole capacity can be had from a full bucket, and leaves a debt.

    Args:
        held: for requests that run; each becomes a charge when it ends, or `rate.fills_in_s` after it began.
        last_held_s: when the youngest of them began.
    """
    need, there = min(amount, rate.capacity), level(rate, full_at_s, now_s)
    short = need + held - there
    if short <= rate.slack:
        return 0.0
    if need + held <= rate.capacity:
        return short / rate.per_s
    # Only when some of them have ended. At the latest then all are charged, and their part refills.
    lapsed_in_s = max(0.0, last_held_s + rate.fills_in_s - now_s)
    left = min(rate.capacity, there + rate.per_s * lapsed_in_s) - held
    return lapsed_in_s + max(0.0, need - left) / rate.per_s
