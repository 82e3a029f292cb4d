"""What is counted when a worker is lost and its requests move on. All series are there from the start."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import Counter, Histogram

from frontend.resumption import Way
from frontend.worker_failure import FailureKind


class Stage(StrEnum):
    """How far a request had come: its prompt was being computed, it waited for its first token, it was answered."""

    PREFILL = "prefill"
    FIRST_TOKEN = "first_token"
    ANSWER = "answer"


class Refusal(StrEnum):
    """Why a request was not sent to another worker but ended in an error."""

    LIMIT = "limit"
    BUDGET = "budget"
    ATTEMPTS = "attempts"
    NO_WORKER = "no_worker"


MIGRATIONS = Counter(
    "slipstream_migrations",
    "Times a request was sent to other workers after one failed it, by what that one did (lost, timeout, silent, "
    "refused, failed) and how far the request had come (prefill, first_token, answer). Clients did not notice; a "
    "steady rate points at a sick worker.",
    ["reason", "stage"],
)
MIGRATIONS_REFUSED = Counter(
    "slipstream_migrations_refused",
    "Requests that ended in an error because they were not sent to another worker: limit (frontend.max_migrations: "
    "every worker that had it was lost), budget (frontend.migration_share), attempts (frontend.max_attempts), "
    "no_worker (none was there in time). Alert on any.",
    ["reason"],
)
RESUMPTIONS = Counter(
    "slipstream_migration_resumptions",
    "Answers that went on from another worker in their middle: continued from prompt and tokens, replayed from the "
    "prompt (a seed, or penalties with temperature 0), or approximated, where neither was possible exactly.",
    ["way"],
)
RECOMPUTED_TOKENS = Counter(
    "slipstream_migration_recomputed_tokens",
    "Tokens that went through a model again because a worker was lost: prompts and answers that the next worker had "
    "not cached, and answers that were replayed.",
)
GAP_SECONDS = Histogram(
    "slipstream_migration_gap_seconds",
    "What a client saw of a migration: from the last token before it, or the dispatch where there was none, to the "
    "first token after it, by the stage in which the worker was lost.",
    ["stage"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120),
)

for _stage in Stage:
    GAP_SECONDS.labels(_stage.value)
    for _kind in FailureKind:
        MIGRATIONS.labels(_kind.value, _stage.value)
for _refusal in Refusal:
    MIGRATIONS_REFUSED.labels(_refusal.value)
for _way in Way:
    RESUMPTIONS.labels(_way.value)
