"""Judges a request by all its tries: right tokens, exactly one end, errors only where they are promised, no hang."""

from __future__ import annotations

from collections import Counter

from tests.faults.chaos.answers import Expected, Pool
from tests.faults.chaos.checker import Checker
from tests.faults.chaos.clients import Try
from tests.faults.chaos.plan import Face, PlannedRequest
from tests.faults.chaos.promises import FULL, excused

_GOOD = ("answered", "left")


def judge(
    planned: PlannedRequest,
    tries: list[Try],
    pool: Pool,
    checker: Checker,
    requests: Counter[str],
    excuses: Counter[str],
) -> None:
    """Check one request, and count how it ended."""
    expected = pool.expected(planned)
    checker.check("every request has an end", bool(tries) and bool(tries[-1].outcome), f"{planned} has none")
    for one in tries:
        where = f"{one.name} at {one.frontend.name} ({planned.face}, {planned.form}, {one.outcome})"
        checker.check("no hang", one.outcome != "hung", f"{where}: no end after {one.ended_s - one.began_s:.0f} s")
        checker.check("answers are well formed", not one.malformed, f"{where}: {one.malformed}")
        wrong = _wrong(one, planned, expected)
        checker.check("no wrong token", not wrong, f"{where}: {wrong}")
        if one.outcome in FULL:
            checker.check("who is refused is told when to come again", one.retry_after_s is not None, where)
        if one.outcome not in (*_GOOD, "hung", "malformed"):
            cause = excused(checker.disturbances, one.outcome, one.frontend.index, one.began_s, one.ended_s)
            if cause is not None:
                excuses[f"{one.outcome} under {cause.kind} of {cause.group}"] += 1
            checker.check("errors are promised ones", cause is not None, f"{where}: {one.status} {one.message}")
    last = tries[-1].outcome if tries else "none"
    requests["answered" if last == "answered" else "left" if last == "left" else f"failed: {last}"] += 1
    if last not in _GOOD:
        # One frontend was gone, and the other one full: it was told to come again later than its client could wait.
        refused = any(one.outcome in FULL for one in tries)
        checker.check("who tries again is answered", refused, f"{tries[-1].name}: {[one.outcome for one in tries]}")


def _wrong(one: Try, planned: PlannedRequest, expected: Expected) -> str:
    """What is not as the undisturbed engine says; of an answer that was cut short its beginning must be right."""
    whole = one.outcome == "answered"
    if planned.face is Face.GRPC and one.token_ids:
        limit = expected.token_ids
        if tuple(one.token_ids) != limit[: len(one.token_ids)]:
            at = next((n for n, (a, b) in enumerate(zip(one.token_ids, limit, strict=False)) if a != b), len(limit))
            return f"token {at} of {len(one.token_ids)} is wrong"
        if planned.logprobs and one.logprob_ids != one.token_ids:
            return "the logprobs are of other tokens"
    for index, text in one.texts.items():
        if not expected.text.startswith(text) or (whole and text != expected.text):
            return f"answer {index} is {text!r} instead of {expected.text!r}"
    if not whole:
        return ""
    if sorted(one.texts) != list(range(planned.n)) or sorted(one.finish) != list(range(planned.n)):
        return f"{planned.n} answers were asked for, {sorted(one.texts)} came, {sorted(one.finish)} ended"
    if set(one.finish.values()) != {expected.finish_reason}:
        return f"the finish reasons are {one.finish} instead of {expected.finish_reason}"
    if expected.finish_reason == "length" and one.completion_tokens != planned.n * len(expected.token_ids):
        return f"usage tells of {one.completion_tokens} tokens instead of {planned.n * len(expected.token_ids)}"
    return ""
