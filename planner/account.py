"""Why a decision was taken: its numbers by name, and one line for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.capacity import Corrections
from planner.demand import Demand
from planner.objectives import Objective
from planner.observation import Observation, WorkerSeen
from planner.pool_model import Prediction
from planner.scaling import Counts


@dataclass(frozen=True, slots=True)
class Look:
    """One model now.

    Attributes:
        workers: as they will be once every action that was decided is done.
        have: their counts, those that are coming included.
        floor: of bounds and schedule.
        backlog_s: prompts that wait, as seconds of one worker's time.
        demands: by class with an objective: what is prepared for.
        batch: work without an objective; None: none.
        load: prompt and answer tokens per second that are expected.
        calm_rates: requests per second by class, over the longest window.
        caution, patience: see `planner.caution`.
    """

    model: str
    workers: list[WorkerSeen]
    have: Counts
    floor: Counts
    backlog_s: float
    demands: Mapping[str, Demand]
    batch: Demand | None
    load: tuple[float, float]
    calm_rates: Mapping[str, float]
    corrections: Corrections
    objectives: Mapping[str, Objective]
    caution: float
    patience: float


@dataclass(frozen=True, slots=True)
class Account:
    """One model's part of a decision.

    Attributes:
        needed: the cheapest counts for what may come; kept: those that would do without the others.
        prediction: of the counts that are there.
        held: what limits keep from being done now.
    """

    look: Look
    target: Counts
    needed: Counts | None
    kept: Counts | None
    prediction: Prediction | None
    held: str


def numbers_of(accounts: Iterable[Account], seen: Observation) -> dict[str, float]:
    """Everything that the decision was computed from; a model's under its name, a class' under its own."""
    numbers = {"gpus_used": float(sum(one.gpus for one in seen.workers))}
    for one in accounts:
        prefix = one.look.model
        numbers.update({f"{prefix}.{name}": float(value) for name, value in _of_model(one).items()})
        for name, demand in one.look.demands.items():
            values = _of_class(one.look, name, demand, seen)
            numbers.update({f"{prefix}.{name}.{key}": float(value) for key, value in values.items()})
    return numbers


def _of_model(account: Account) -> dict[str, float]:
    look, prediction = account.look, account.prediction
    numbers = {
        "backlog_s": look.backlog_s,
        "caution": look.caution,
        "prefill_correction": look.corrections.prefill,
        "decode_correction": look.corrections.decode,
        "batch.requests_per_s": look.batch.requests_per_s if look.batch is not None else 0.0,
    }
    counts = {"have": look.have, "floor": look.floor, "needed": account.needed, "kept": account.kept}
    for name, each in {**counts, "target": account.target}.items():
        if each is not None:
            numbers[f"{name}_prefill"], numbers[f"{name}_decode"] = each.prefill, each.decode
    if prediction is not None:
        numbers |= {
            "predicted_ttft_s": prediction.ttft_s,
            "predicted_itl_s": prediction.itl_s,
            "predicted_ttft_share": prediction.ttft_share,
            "predicted_itl_share": prediction.itl_share,
            "predicted_goodput_per_s": prediction.goodput,
            "prefill_use": prediction.prefill_use,
            "decode_use": prediction.decode_use,
        }
    return numbers


def _of_class(look: Look, name: str, demand: Demand, seen: Observation) -> dict[str, float]:
    numbers = {
        "requests_per_s": look.calm_rates.get(name, 0.0),
        "forecast_requests_per_s": demand.requests_per_s,
        "input_tokens": demand.input_tokens,
        "input_variation": demand.input_variation,
        "output_tokens": demand.output_tokens,
        "hit_rate": demand.hit_rate,
        "burstiness": demand.burstiness,
    }
    traffic, objective = seen.traffic.get((look.model, name)), look.objectives.get(name)
    if objective is not None:
        numbers |= {
            "ttft_limit_s": objective.ttft_s,
            "itl_limit_s": objective.itl_s,
            "percentile": objective.percentile,
        }
    if traffic is not None and objective is not None:
        numbers |= {
            "ttft_s": traffic.ttft.percentile_s(objective.percentile),
            "itl_s": traffic.itl.percentile_s(objective.percentile),
            "queued": traffic.queued,
            "oldest_wait_s": traffic.oldest_wait_s,
        }
    return numbers


def reason_of(accounts: Iterable[Account]) -> str:
    """One line: a part for each model."""
    return " | ".join(map(_reason, accounts)) or "no model is in the policy"


def _reason(account: Account) -> str:
    look, prediction = account.look, account.prediction
    rate = sum(one.requests_per_s for one in look.demands.values())
    change = f"{look.have} stays" if account.target == look.have else f"{look.have} to {account.target}"
    parts = [f"{look.model}: {change}", f"up to {rate:.3g} requests/s expected"]
    if prediction is None:
        parts.append("no profile is known: only the floor is kept")
    else:
        parts.append(
            f"with {look.have} {prediction.ttft_share:.1%} of first tokens and {prediction.itl_share:.1%} of answers "
            "in time"
        )
    if look.backlog_s > 0.0:
        parts.append(f"{look.backlog_s:.1f} s of prompts wait")
    if account.held:
        parts.append(f"held back: {account.held}")
    return "; ".join(parts)
