"""One workload under one rule for worker counts, in the simulator: what `benchmarks.planner` and `published` repeat.

Every rule has the same budget, start-up time, router, admission and first workers. Goodput per GPU-hour is requests
that kept both their TTFT and their ITL limit, over the hours for which workers, starting and draining ones too,
occupied GPUs. Requests that were refused, failed or late count in nothing but the attainment's denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.planner_baselines import Hpa, LlmDSloAware, LlmDTokenAware, Pool, Static
from benchmarks.planner_dynamo import DynamoLoad, DynamoThroughput, Sla
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.policy import SloPolicy
from planner.scaling import Counts, ScalingPolicy
from simulator.outcome import Outcome
from simulator.run import ModelSetup, Setup, profile_named, simulate
from simulator.traces import Arrival
from slipstream.performance import Predictor, Profile

MODEL = "m"
CLASS = "realtime"
START_S = 60.0
OURS = "slipstream"
PROBE_SLACK = 0.05


@dataclass(frozen=True, slots=True)
class Workload:
    """A load and the cluster that is to serve it.

    Attributes:
        load: makes the requests; called once a run.
        workers: that fit into the budget.
        first: workers that every changing rule begins with.
        probe: makes the hardest part of it, on which splits are searched before they are tried on the whole.
    """

    name: str
    profile: str
    workers: int
    objective: Objective
    load: Callable[[], Iterable[Arrival]]
    first: Counts
    probe: Callable[[], Iterable[Arrival]]
    block_tokens: int = 0

    def pool(self) -> Pool:
        return Pool(MODEL, self.workers)

    def known(self) -> Profile:
        return profile_named(self.profile, self.block_tokens)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a rule came to. `counts` is the split of one that never changes, else the last one wanted."""

    workload: str
    rule: str
    counts: str
    attainment: float
    ttft_attainment: float
    itl_attainment: float
    good_per_gpu_hour: float
    goodput_per_s: float
    gpu_hours: float
    ttft_mean_s: float
    ttft_p99_s: float
    itl_p99_s: float
    refused: int
    actions: int
    flips: int


def _ours(workload: Workload) -> ScalingPolicy:
    profile = workload.known()
    objectives = ModelObjectives(MODEL, {CLASS: workload.objective})
    policy = PlannerObjectives((objectives,), gpu_budget=workload.workers * profile.gpus, start_s=START_S)
    return SloPolicy(policy, {MODEL: profile})


def _token_aware(workload: Workload) -> ScalingPolicy:
    profile = workload.known()
    tokens_per_s = profile.step_tokens / Predictor(profile).prefill_s(profile.step_tokens)
    return LlmDTokenAware(workload.pool(), tokens_per_s)


def _sla(workload: Workload) -> Sla:
    return Sla(workload.objective.ttft_s, workload.objective.itl_s)


RULES: dict[str, Callable[[Workload], ScalingPolicy]] = {
    OURS: _ours,
    "static 1:1": lambda one: Static(one.pool(), one.first),
    "hpa": lambda one: Hpa(one.pool()),
    "llm-d token-aware": _token_aware,
    "llm-d SLO-aware": lambda one: LlmDSloAware(one.pool(), one.objective.ttft_s, one.objective.itl_s),
    "dynamo load": lambda one: DynamoLoad(one.pool(), Predictor(one.known()), _sla(one)),
    "dynamo throughput": lambda one: DynamoThroughput(one.pool(), Predictor(one.known()), _sla(one)),
}


def run(workload: Workload, rule: str | Counts, *, probe: bool = False) -> Measured:
    """A run under a rule, or with counts that stay: of the whole load, or of its hardest part."""
    policy = RULES[rule](workload) if isinstance(rule, str) else None
    first = workload.first if isinstance(rule, str) else rule
    outcome = simulate(setup_of(workload, first, policy, workload.probe if probe else workload.load))
    last = outcome.decisions[-1].targets.get(MODEL, "") if outcome.decisions else str(first)
    name = rule if isinstance(rule, str) else "static"
    return measured(workload.name, name, last, outcome)


def setup_of(
    workload: Workload, first: Counts, policy: ScalingPolicy | None, load: Callable[[], Iterable[Arrival]]
) -> Setup:
    """The run of that load in that workload's cluster."""
    profile = workload.known()
    model = ModelSetup(MODEL, profile, first, {CLASS: workload.objective})
    budget = workload.workers * profile.gpus
    return Setup((model,), load(), policy, gpu_budget=budget, start_s=START_S, series_s=60.0)


def measured(workload: str, rule: str, counts: str, outcome: Outcome) -> Measured:
    """A run's figures."""
    figures = outcome.all
    return Measured(
        workload,
        rule,
        counts,
        figures.attainment,
        figures.ttft_attainment,
        figures.itl_attainment,
        outcome.good_per_gpu_hour,
        figures.goodput_per_s,
        outcome.gpu_hours,
        figures.ttft.mean_s,
        figures.ttft.p99_s,
        figures.itl.p99_s,
        figures.refused,
        outcome.actions,
        sum(one.flips for one in outcome.workers),
    )


def best_of(found: Iterable[Measured], wanted: float) -> Measured:
    """Of those with that attainment the one with the most goodput per GPU-hour; where none has it, with the most
    requests within their limits."""
    every = list(found)
    reaching = [one for one in every if one.attainment >= wanted]
    if reaching:
        return max(reaching, key=lambda one: one.good_per_gpu_hour)
    return max(every, key=lambda one: (round(one.attainment, 3), one.good_per_gpu_hour))


def border(workers: int, wanted: float, measure: Callable[[Counts], Measured]) -> list[Measured]:
    """Static splits along the border between those that reach `wanted` and those that do not.

    More workers of either role make nothing worse, so that no split beside the border is both good enough and cheaper.
    """
    tried: list[Measured] = []
    prefill, decode = workers - 1, 1
    while prefill >= 1 and decode < workers:
        prefill = min(prefill, workers - decode)
        tried.append(measure(Counts(prefill, decode)))
        if tried[-1].attainment >= wanted:
            prefill -= 1
        else:
            decode += 1
    return tried


def oracle(workload: Workload, wanted: float) -> tuple[Measured, list[Measured]]:
    """The best static split, chosen with all of the load known, and all runs that were made for it.

    Splits are searched on the hardest part; the whole, which is easier, is then tried with those that come near
    `wanted` there, the cheapest first, until one reaches it.
    """
    probes = border(workload.workers, wanted, lambda counts: run(workload, counts, probe=True))
    near = [one for one in probes if one.attainment >= wanted - PROBE_SLACK]
    ranked = sorted(near or [best_of(probes, wanted)], key=lambda one: one.gpu_hours)
    whole: list[Measured] = []
    for one in ranked:
        whole.append(run(workload, split_named(one.counts)))
        if whole[-1].attainment >= wanted:
            break
    return best_of(whole, wanted), probes + whole


def split_named(text: str) -> Counts:
    """Of its short form, such as 3P2D."""
    prefill, _, decode = text.rstrip("D").partition("P")
    return Counts(int(prefill), int(decode))
