"""What really happened corrects what is predicted: per worker, and for the length of answers per model."""

from __future__ import annotations

from dataclasses import dataclass, field

from frontend.router.fleet import Fleet
from frontend.router.route import Route
from frontend.router.speeds import COLD_SAMPLES

FEW_TOKENS = 8
"""Answers shorter than this say little of the time between tokens."""

TEACHING_SAMPLES = 3 * COLD_SAMPLES + 8
"""After so many samples the others of its kind have heard what a worker is like; looking for them costs time."""

LENGTH_WEIGHT = 0.02
"""Of a new answer in the mean length of answers."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One dispatch that went well, as it was seen from the frontend. None: not seen.

    Attributes:
        prefill_s: from the dispatch until the prefill worker had computed the prompt; None for decode alone.
        computed_tokens: of the prompt, that the computing worker computed.
        received_tokens: of the prompt, that it was handed over by another one.
        ttft_s: from the dispatch to the first token.
        itl_s: mean between tokens.
        tokens: generated.
    """

    prompt_tokens: int
    prefill_s: float | None = None
    computed_tokens: int | None = None
    received_tokens: int = 0
    ttft_s: float | None = None
    itl_s: float | None = None
    tokens: int = 0


@dataclass(slots=True)
class AnswerLengths:
    """The mean length of a model's answers, the newest weighing most."""

    _tokens: dict[str, float] = field(default_factory=dict)

    def note(self, model: str, tokens: int) -> None:
        """An answer came to its end."""
        before = self._tokens.get(model)
        self._tokens[model] = tokens if before is None else before + LENGTH_WEIGHT * (tokens - before)

    def of(self, model: str) -> float:
        """Tokens; 0 before the first answer."""
        return self._tokens.get(model, 0.0)


def learn(fleet: Fleet, route: Route, outcome: Outcome) -> None:
    """Correct the speeds of the route's workers by what came of its prediction."""
    if route.predicted is None:
        return
    _learn_prompt(fleet, route, outcome)
    _learn_handoff(fleet, route, outcome)
    _learn_step(fleet, route, outcome)
    for role in (route.prefill, route.decode):
        one = fleet.get(role.worker_id) if role is not None else None
        if one is not None and one.experience <= TEACHING_SAMPLES:
            one.teach()


def _learn_prompt(fleet: Fleet, route: Route, outcome: Outcome) -> None:
    """Of the computing worker: queue and computation together, since its queue is made of the same work."""
    predicted = route.predicted
    assert predicted is not None, "checked by learn"
    if route.prefill is not None:
        one, seen_s = fleet.get(route.prefill.worker_id), outcome.prefill_s
    else:
        one, seen_s = fleet.get(route.decode.worker_id), outcome.ttft_s
    if one is None or seen_s is None or not outcome.computed_tokens or outcome.received_tokens:
        return
    # By what was really computed: a wrong idea of the cache is no wrong idea of the speed.
    cached = outcome.prompt_tokens - outcome.computed_tokens
    raw_s = one.curve.predictor.prefill_s(outcome.computed_tokens, cached) + predicted.queue_s / one.prefill.factor
    if route.prefill is None:
        seen_s -= predicted.slot_s + predicted.itl_s
    one.prefill.note(seen_s, raw_s)
    one.refresh()


def _learn_handoff(fleet: Fleet, route: Route, outcome: Outcome) -> None:
    """Of the decode worker: what comes between the computed prompt and the first token, without its step."""
    predicted = route.predicted
    assert predicted is not None, "checked by learn"
    one = fleet.get(route.decode.worker_id)
    if one is None or route.prefill is None or outcome.prefill_s is None or outcome.ttft_s is None:
        return
    if predicted.transfer_s > 0 and predicted.slot_s == 0:
        seen_s = outcome.ttft_s - outcome.prefill_s - predicted.itl_s
        one.handoff.note(max(seen_s, 1e-4), predicted.transfer_s / one.handoff.factor)
        one.refresh()


def _learn_step(fleet: Fleet, route: Route, outcome: Outcome) -> None:
    predicted = route.predicted
    assert predicted is not None, "checked by learn"
    one = fleet.get(route.decode.worker_id)
    if one is not None and outcome.itl_s is not None and outcome.tokens >= FEW_TOKENS:
        one.step.note(outcome.itl_s, predicted.itl_s / one.step.factor)
        one.refresh()
