"""The router in a running frontend: asks it, remembers what it said, and teaches it what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from frontend.attempt import Attempt
from frontend.decisions import Decision, Decisions, actual
from frontend.dispatch_metrics import PREDICTION_RATIO, ROUTES
from frontend.router import Ask, Fleet, Route, Router
from frontend.router.learning import AnswerLengths, Outcome, learn


@dataclass(slots=True)
class Routing:
    """One dispatcher's routing."""

    fleet: Fleet
    router: Router
    decisions: Decisions = field(default_factory=Decisions)
    _lengths: AnswerLengths = field(default_factory=AnswerLengths)

    def choose(self, ask: Ask, now_s: float) -> Route:
        """`Router.choose`, with what experience says of the answer's length; raises the same."""
        return self.router.choose(replace(ask, expected_tokens=self._lengths.of(ask.model)), self.fleet, now_s)

    def decided(self, request_id: str, ask: Ask, route: Route, unix_s: float) -> Decision:
        """A request is dispatched by this route, which may be another one than was chosen."""
        ROUTES.labels(self.router.policy, route.reason).inc()
        return self.decisions.record(request_id, ask, route, self.router.policy, unix_s)

    def ended(self, attempt: Attempt) -> None:
        """A dispatch ended, in whatever way."""
        outcome = outcome_of(attempt)
        decision = self.decisions.open_of(attempt.job.request_id)
        if decision is not None:
            decision.actual = actual(outcome)
        if not attempt.tokens_came:
            return
        self._lengths.note(attempt.job.model, outcome.tokens)
        if attempt.recomputed:
            return
        _measure(attempt.route, outcome)
        learn(self.fleet, attempt.route, outcome)


def outcome_of(attempt: Attempt) -> Outcome:
    """What was seen of a dispatch."""
    computed, later = attempt.computed, attempt.tokens - attempt.first_tokens
    alone = attempt.route.prefill is None
    return Outcome(
        prompt_tokens=len(attempt.job.token_ids),
        prefill_s=attempt.prefill_s if computed is not None else None,
        computed_tokens=attempt.decode_computed_tokens if alone else computed.computed_tokens if computed else None,
        received_tokens=computed.received_tokens if computed is not None else 0,
        ttft_s=attempt.first_s if attempt.tokens_came else None,
        itl_s=(attempt.last_s - attempt.first_s) / later if later > 0 else None,
        tokens=attempt.tokens,
    )


def _measure(route: Route, outcome: Outcome) -> None:
    predicted = route.predicted
    if predicted is None:
        return
    if outcome.prefill_s is not None:
        PREDICTION_RATIO.labels("prefill").observe(outcome.prefill_s / (predicted.queue_s + predicted.prefill_s))
    if outcome.ttft_s is not None:
        PREDICTION_RATIO.labels("ttft").observe(outcome.ttft_s / predicted.ttft_s)
    if outcome.itl_s is not None:
        PREDICTION_RATIO.labels("itl").observe(outcome.itl_s / predicted.itl_s)
