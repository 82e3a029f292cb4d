"""Requests whose worker was lost: who may go to another one, how long an answer waits for it, what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from frontend.attempt import Attempt
from frontend.migration_budget import WINDOW_S, MigrationBudget
from frontend.migration_metrics import (
    GAP_SECONDS,
    MIGRATIONS,
    MIGRATIONS_REFUSED,
    RECOMPUTED_TOKENS,
    RESUMPTIONS,
    Refusal,
    Stage,
)
from frontend.progress import Progress
from frontend.router import RETRY_AFTER_S
from frontend.worker_failure import FailureKind, WorkerFailure
from slipstream import telemetry
from slipstream.errors import MigrationBudgetError, MigrationLimitError, SlipstreamError
from slipstream.settings import FrontendSettings

log = telemetry.get_logger(__name__)

LEAST_MIGRATIONS = 16
"""Within a window, whatever the share: of few requests a share is nothing."""


class Migrations:
    """One dispatcher's."""

    def __init__(self, settings: FrontendSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        share = settings.migration_share
        self._budget = MigrationBudget(share, LEAST_MIGRATIONS if share else 0)

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request is with the workers while the block runs."""
        self._budget.begun()
        try:
            yield
        finally:
            self._budget.ended(self._clock())

    def failed(self, failure: WorkerFailure, progress: Progress, attempt: Attempt) -> None:
        """Returns if the request may be sent to another worker.

        Raises:
            SlipstreamError: it may not.
        """
        stage = progress.stage_of(failure)
        progress.note_silence(attempt, stage)
        try:
            progress.failed(failure)
        except MigrationLimitError:
            self._refuse(Refusal.LIMIT, progress)
            raise
        except SlipstreamError:
            self._refuse(Refusal.ATTEMPTS, progress)
            raise
        if failure.kind.suspicious and not self._budget.take(self._clock()):
            self._refuse(Refusal.BUDGET, progress)
            limit = self._budget.limit(self._clock())
            raise MigrationBudgetError(
                f"{failure.role} worker {failure.worker.worker_id} was lost, and {limit} requests have been sent to "
                f"other workers within {WINDOW_S:g} s, as many as may be (frontend.migration_share = "
                f"{self._settings.migration_share:g})",
                retry_after_s=RETRY_AFTER_S,
            ) from failure
        MIGRATIONS.labels(failure.kind.value, stage.value).inc()
        if stage is Stage.ANSWER:
            RESUMPTIONS.labels(progress.way.value).inc()

    def waits(self, progress: Progress) -> bool:
        """Whether it is worth waiting for a worker: one that had the request was lost, or failed in the middle of the
        answer. Most are back, or reached again, within seconds."""
        since_s, now_s, failure = progress.silent_since_s, self._clock(), progress.last_failure
        lost = failure is not None and failure.kind is FailureKind.LOST
        if since_s is None or not (progress.generated or lost):
            return False
        return now_s < min(since_s + self._settings.migration_wait_s, progress.deadline_s)

    def no_worker(self, progress: Progress) -> None:
        """None was there in time."""
        self._refuse(Refusal.NO_WORKER, progress)

    def resumed(self, progress: Progress) -> None:
        """The client gets something again."""
        assert progress.silent_since_s is not None, "it was not silent"
        gap_s, progress.silent_since_s = self._clock() - progress.silent_since_s, None
        GAP_SECONDS.labels(progress.silent_stage.value).observe(gap_s)
        log.info(
            "request_migrated",
            request_id=progress.request.request_id,
            stage=progress.silent_stage.value,
            tokens_passed=len(progress.generated),
            gap_s=round(gap_s, 3),
        )

    def diverged(self, progress: Progress) -> None:
        """An answer that was made again came to other tokens: it goes on from those that were sent."""
        RESUMPTIONS.labels(progress.way.value).inc()
        log.warning("replay_diverged", request_id=progress.request.request_id, tokens_passed=len(progress.generated))

    def attempt_ended(self, attempt: Attempt, progress: Progress) -> None:
        """One that a failed worker made necessary."""
        if attempt.tokens_came:
            RECOMPUTED_TOKENS.inc(progress.note_recomputed(attempt))

    def _refuse(self, refusal: Refusal, progress: Progress) -> None:
        MIGRATIONS_REFUSED.labels(refusal.value).inc()
        log.warning("migration_refused", request_id=progress.request.request_id, reason=refusal.value)
