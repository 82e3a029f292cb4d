"""The dashboard of the frontend: where a request's time goes before it is with the workers."""

from __future__ import annotations

from deploy.dashboard_parts import MODELS, F
from deploy.grafana_json import Dashboard, Panel, Query, Row, quantiles, rate

FRONTEND = Dashboard(
    "slipstream-frontend",
    "Slipstream: frontend",
    "Where a request's time goes before it is with the workers, and what became of it.",
    (MODELS,),
    (
        Row(
            "Stages",
            (
                Panel(
                    "Stages, p99",
                    "receive: body read and checked; tokenize; route: the decision.",
                    quantiles(f"{F}stage_seconds", "", 0.99, by="stage"),
                    "s",
                ),
                Panel(
                    "Stages, mean",
                    "All of it is this process' own work: high values mean that it needs more CPU.",
                    (
                        Query(
                            f"sum by (stage) (rate({F}stage_seconds_sum[$__rate_interval]))"
                            f" / sum by (stage) (rate({F}stage_seconds_count[$__rate_interval]))",
                            "{{stage}}",
                        ),
                    ),
                    "s",
                ),
                Panel(
                    "Prompt computed after",
                    "From dispatch to the computed prompt: the prefill worker's queue and its computation.",
                    quantiles(f"{F}prefill_seconds", "", 0.5, 0.99),
                    "s",
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Panel(
                    "By endpoint",
                    "Requests in a second.",
                    (rate(f"{F}requests_total", by="face, endpoint"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "In flight",
                    "By face and endpoint.",
                    (Query(f"sum by (face, endpoint) ({F}requests_in_flight)", "{{face}} {{endpoint}}"),),
                ),
                Panel(
                    "Broken streams",
                    "Answers that ended in an error after they had begun.",
                    (rate(f"{F}broken_streams_total", by="code"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Admission",
            (
                Panel(
                    "Queued here",
                    "Requests that wait for room at the workers, by class. Above zero for long: add workers.",
                    (Query(f"sum by (class) ({F}queue_requests)", "{{class}}"),),
                    stacked=True,
                ),
                Panel(
                    "Wait, p99",
                    "In the frontend's queue, by class.",
                    quantiles(f"{F}queue_seconds", "", 0.99, by="class"),
                    "s",
                ),
                Panel(
                    "Let in, by tenant",
                    "Requests that went to the workers.",
                    (rate(f"{F}admitted_total", by="tenant"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Refused and preempted",
                    "429 by class and reason. Batch alone is as it should be under load.",
                    (
                        rate(f"{F}refused_total", by="class, reason"),
                        Query(rate(f"{F}preempted_total").expr, "preempted"),
                    ),
                    "reqps",
                ),
            ),
        ),
        Row(
            "When workers fail",
            (
                Panel(
                    "Failed calls",
                    "To workers, by their role and kind. A steady rate points at a sick worker.",
                    (rate(f"{F}worker_failures_total", by="role, kind"),),
                    "ops",
                ),
                Panel(
                    "Migrations",
                    "Requests that went to other workers, by what theirs did and how far they were; their clients did "
                    "not notice. Refused ones are errors that clients saw: alert on any.",
                    (
                        rate("slipstream_migrations_total", by="stage, reason"),
                        Query(rate("slipstream_migrations_refused_total", by="reason").expr, "refused: {{reason}}"),
                    ),
                    "ops",
                ),
                Panel(
                    "Gap that clients saw",
                    "Median and 99th percentile, from the last token before a worker was lost (or the dispatch) to "
                    "the first after it.",
                    quantiles("slipstream_migration_gap_seconds", "", 0.5, 0.99, by="stage"),
                    "s",
                ),
                Panel(
                    "Computed again",
                    "Tokens that went through a model again because a worker was lost, and how answers went on: "
                    "continued, replayed (seed, penalties), approximated.",
                    (
                        Query(rate("slipstream_migration_recomputed_tokens_total").expr, "tokens"),
                        rate("slipstream_migration_resumptions_total", by="way"),
                    ),
                    "none",
                ),
                Panel(
                    "Control plane heard",
                    "1 while the frontend hears it; at 0 it serves from its last view of the workers.",
                    (Query(f"min by (instance) ({F}registry_connected)", "{{instance}}"),),
                    "none",
                ),
            ),
        ),
        Row(
            "Process",
            (
                Panel(
                    "CPU",
                    "Cores that each frontend uses, all its processes together. At 1 for each of them it is at its "
                    "end: use more (frontend.workers).",
                    (
                        Query(
                            "rate(process_cpu_seconds_total[$__rate_interval])"
                            f" and on (instance) {F}registry_connected",
                            "{{instance}}",
                        ),
                    ),
                    "none",
                ),
                Panel(
                    "Memory",
                    "Resident. Should be flat.",
                    (Query(f"process_resident_memory_bytes and on (instance) {F}registry_connected", "{{instance}}"),),
                    "bytes",
                ),
            ),
        ),
    ),
)
