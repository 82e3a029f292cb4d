"""A load as a person asks for it: a trace's file, or a rate and lengths. `simulator.chosen_load` makes it.

The command line makes a `LoadChoice` of its flags, the planner's service of a message. Light: imported for every
command's help.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MOST_TOKENS = 1 << 17
MAX_HIT_RATE = 0.95

TraceFormat = Literal["auto", "mooncake", "azure", "access-log"]
Shape = Literal["steady", "bursts", "daily"]
Tokens = Annotated[float, Meta(ge=1, le=MOST_TOKENS)]
Variation = Annotated[float, Meta(ge=0, le=10)]


class LoadChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A trace, or, without one, a synthetic load.

    Attributes:
        speed: the trace this many times as fast as it was recorded.
        input_variation, output_variation: standard deviation of the lengths over their mean.
        hit_rate: share of prompt tokens that begin as others did before, in one of a few texts.
        peak_to_trough, period_s: of a daily load, whose mean is `rate_per_s`.
        requests, duration_s: either ends the load; 0: the whole trace, or what `default_requests` says.
    """

    trace: str = ""
    format: TraceFormat = "auto"
    speed: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    rate_per_s: Annotated[float, Meta(gt=0, le=1e5)] = 1.0
    input_tokens: Tokens = 1000.0
    output_tokens: Tokens = 200.0
    input_variation: Variation = 1.0
    output_variation: Variation = 0.5
    hit_rate: Annotated[float, Meta(ge=0, le=MAX_HIT_RATE)] = 0.0
    shape: Shape = "steady"
    peak_to_trough: Annotated[float, Meta(ge=1, le=1000)] = 5.0
    period_s: Annotated[float, Meta(ge=60, le=604800)] = 86400.0
    requests: Annotated[int, Meta(ge=0)] = 0
    duration_s: Annotated[float, Meta(ge=0)] = 0.0
    seed: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
