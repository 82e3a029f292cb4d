"""Published results whose workload is not known, as ranges: row 7, and what row 8 says of disaggregation."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.planner_runs import CLASS, MODEL
from planner.objectives import Objective
from planner.scaling import Counts
from simulator import loads
from simulator.run import ModelSetup, Setup, profile_named, simulate

REQUESTS = 600
SHARE = 0.9
"""Of the requests that shall keep both limits."""

STEPS = 6
LIMITS = Objective(2.0, 0.05)
"""No limits are published with either row: these are ours."""

AMAZON_INPUT = 3000
AMAZON_OUTPUTS = (95, 190, 380)
DYNAMO_LENGTHS = ((3000, 150), (4000, 800))


@dataclass(frozen=True, slots=True)
class Shape:
    """Workers of each role; no prefill workers: decode workers do all."""

    name: str
    prefill: str
    decode: str
    counts: Counts

    @property
    def gpus(self) -> int:
        return (
            self.counts.prefill * profile_named(self.prefill).gpus
            + self.counts.decode * profile_named(self.decode).gpus
        )


def aggregated(profile: str, workers: int) -> Shape:
    return Shape(f"{workers} x {profile}", profile, profile, Counts(0, workers))


AMAZON = Shape("12P TP1 + 1D TP4", "qwen2.5-72b-h200-tp1", "qwen2.5-72b-h200-tp4", Counts(12, 1))
AMAZON_AGGREGATED = (aggregated("qwen2.5-72b-h200-tp1", 16), aggregated("qwen2.5-72b-h200-tp4", 4))

NODES = {
    "one node": (
        (aggregated("llama-3.1-70b-h100-tp4", 2), aggregated("llama-3.1-70b-h100-tp8", 1)),
        (Shape("2P TP2 + 1D TP4", "llama-3.1-70b-h100-tp2", "llama-3.1-70b-h100-tp4", Counts(2, 1)),),
    ),
    "two nodes": (
        (aggregated("llama-3.1-70b-h100-tp4", 4), aggregated("llama-3.1-70b-h100-tp8", 2)),
        (
            Shape("4P TP2 + 1D TP8", "llama-3.1-70b-h100-tp2", "llama-3.1-70b-h100-tp8", Counts(4, 1)),
            Shape("6P TP2 + 1D TP4", "llama-3.1-70b-h100-tp2", "llama-3.1-70b-h100-tp4", Counts(6, 1)),
        ),
    ),
}
"""Row 8: the same GPUs, without and with disaggregation; prefill has two GPUs where the weights leave room for KV."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The highest rates within the limits on the same GPUs. `gain` is disaggregated over aggregated."""

    what: str
    input_tokens: int
    output_tokens: int
    gpus: int
    aggregated: str
    aggregated_per_s: float
    disaggregated: str
    disaggregated_per_s: float

    @property
    def gain(self) -> float | None:
        return self.disaggregated_per_s / self.aggregated_per_s if self.aggregated_per_s else None


def amazon() -> list[Sweep]:
    """Row 7: around where that shape is balanced."""
    return [_sweep("row 7", AMAZON_AGGREGATED, (AMAZON,), AMAZON_INPUT, output) for output in AMAZON_OUTPUTS]


def dynamo() -> list[Sweep]:
    """Row 8, disaggregation."""
    return [
        _sweep(f"row 8, {name}", alone, apart, *lengths)
        for name, (alone, apart) in NODES.items()
        for lengths in DYNAMO_LENGTHS
    ]


def _sweep(what: str, alone: tuple[Shape, ...], apart: tuple[Shape, ...], inputs: int, outputs: int) -> Sweep:
    best = [max((highest_rate(one, inputs, outputs), one.name) for one in of) for of in (alone, apart)]
    (alone_per_s, alone_name), (apart_per_s, apart_name) = best
    return Sweep(what, inputs, outputs, apart[0].gpus, alone_name, alone_per_s, apart_name, apart_per_s)


def highest_rate(shape: Shape, input_tokens: int, output_tokens: int) -> float:
    """Requests a second that the shape serves within the limits; 0 where it does not serve even a trickle."""
    low, high = 0.0, 4.0
    while keeps(shape, input_tokens, output_tokens, high) and high < 512:
        low, high = high, high * 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        if keeps(shape, input_tokens, output_tokens, middle):
            low = middle
        else:
            high = middle
    return low


def keeps(shape: Shape, input_tokens: int, output_tokens: int, per_s: float) -> bool:
    """Whether enough requests keep the limits at that rate; lengths vary by half around their means."""
    load = loads.Synthetic(
        loads.Constant(per_s),
        loads.Lognormal(input_tokens, 0.5, 64, 8000),
        loads.Lognormal(output_tokens, 0.5, 8, 2000),
        requests=REQUESTS,
        seed=7,
    )
    model = ModelSetup(MODEL, shape.prefill, shape.counts, {CLASS: LIMITS}, decode_profile=shape.decode)
    return simulate(Setup((model,), load, admission=None)).all.attainment >= SHARE
