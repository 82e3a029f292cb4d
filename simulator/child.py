"""Answers one question of `planner.what_if` and ends: `python -m simulator.child`, with a line of JSON on its input."""

from __future__ import annotations

import math
import os
import signal
import sys
from typing import Any, Literal

import msgspec

from simulator.load_choice import LoadChoice
from simulator.outcome import to_json
from simulator.what_if import RecommendAsk, SimulateAsk, answer_recommend, answer_simulate
from slipstream.errors import InvalidRequestError, SlipstreamError

MOST_REQUESTS = 200_000
"""Of one question: a minute or a few."""
NICENESS = 10


class Question(msgspec.Struct, frozen=True):
    """`request` is a `SimulateAsk`, with `full`, or a `RecommendAsk`."""

    question: Literal["simulate", "recommend"]
    request: dict[str, Any]
    timeout_s: float


def main() -> int:
    """The control plane comes first: this one gets what it leaves of the CPU, and ends by itself when time is up."""
    os.nice(NICENESS)
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    signal.alarm(math.ceil(question.timeout_s) + 1)
    try:
        _write({"result": _answered(question)})
    except msgspec.ValidationError as error:
        _write({"error": {"message": str(error), "param": None}})
    except SlipstreamError as error:
        _write({"error": {"message": error.message, "param": error.param}})
    return 0


def _answered(question: Question) -> object:
    request = dict(question.request)
    if question.question == "recommend":
        wanted = msgspec.convert(request, RecommendAsk)
        _check(wanted.load, wanted.profiles)
        return answer_recommend(wanted, lambda pool: _write({"update": pool}))
    full = request.pop("full", False)
    asked = msgspec.convert(request, SimulateAsk)
    _check(asked.load, tuple(asked.profiles.values()))
    outcome = answer_simulate(asked, lambda requests, at_s: _write({"update": {"requests": requests, "at_s": at_s}}))
    told: dict[str, object] = {
        name: getattr(outcome, name)
        for name in ("duration_s", "gpu_hours", "peak_gpus", "good_per_gpu_hour", "actions", "refused_actions")
    }
    told |= {"all": outcome.all, "classes": outcome.classes}
    return told | ({"outcome_json": to_json(outcome).decode()} if full else {})


def _check(load: LoadChoice, profiles: tuple[str, ...]) -> None:
    """Who asks over the network names no files here, and takes no more time than a few minutes."""
    if load.trace:
        raise InvalidRequestError("load.trace: a file is not read for others", param="load.trace")
    if any("/" in name or "\\" in name for name in profiles):
        raise InvalidRequestError("profiles: must be names of packaged profiles", param="profiles")
    expected = max(load.requests, 0 if load.requests else load.rate_per_s * load.duration_s)
    if expected > MOST_REQUESTS:
        raise InvalidRequestError(
            f"load: {expected:,.0f} requests are more than the {MOST_REQUESTS:,} of one question; run "
            "`slipstream planner simulate` for more",
            param="load.requests",
        )


def _write(line: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
