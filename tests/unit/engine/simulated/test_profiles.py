"""The packaged profiles in the simulated engine: a prompt alone takes what the table says, in whatever steps."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from engine.simulated.profile_choice import PACKAGED
from engine.simulated.request import Request
from engine.simulated.scheduler import Scheduler
from slipstream.performance import Predictor, Profile, read_profile

WITHIN = 0.02


def alone_s(profile: Profile, tokens: int) -> float:
    """Seconds in steps, from the first to the last, of one prompt on an engine that does nothing else."""
    blocks = math.ceil(tokens / profile.block_tokens) + 1
    roomy = msgspec.structs.replace(profile, max_model_len=max(profile.max_model_len, tokens + 1), blocks=blocks)
    scheduler = Scheduler(roomy)
    scheduler.add(Request("alone", tokens, 0, []))
    now_s = 0.0
    while (step := scheduler.plan(now_s)) is not None:
        now_s += step.seconds
        scheduler.finish(step, now_s)
    return now_s


@pytest.mark.parametrize("file", sorted(PACKAGED.glob("*.json")), ids=lambda file: file.stem)
def test_a_prompt_alone_takes_as_long_as_was_measured(file: Path) -> None:
    profile = read_profile(file)
    measured = msgspec.structs.replace(profile, step_tokens=profile.prefill_step_tokens)
    for point in profile.prefill:
        assert alone_s(measured, point.tokens) == pytest.approx(point.seconds, rel=WITHIN), point


@pytest.mark.parametrize("step_tokens", [128, 256, 8192])
@pytest.mark.parametrize("file", sorted(PACKAGED.glob("*.json")), ids=lambda file: file.stem)
def test_other_steps_than_those_of_the_measurement_cost_their_number_and_nothing_else(
    file: Path, step_tokens: int
) -> None:
    profile = msgspec.structs.replace(read_profile(file), step_tokens=step_tokens)
    predict = Predictor(profile)
    for point in profile.prefill:
        seconds = alone_s(profile, point.tokens)
        more = math.ceil(point.tokens / step_tokens) - math.ceil(point.tokens / profile.prefill_step_tokens)
        assert seconds == pytest.approx(point.seconds + more * predict.step_overhead_s, rel=WITHIN), point
        assert seconds == pytest.approx(predict.prefill_s(point.tokens)), "the router expects the same"
