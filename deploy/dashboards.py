"""Slipstream's Grafana dashboards. `python -m deploy.dashboards` writes them to deploy/grafana.

A test checks every query against the metrics of a running cluster.
"""

from __future__ import annotations

from pathlib import Path

from deploy.grafana_json import Dashboard, Panel, Query, Row, Variable, quantiles, rate, ratio, render
from deploy.planner_dashboard import PLANNER

FOLDER = Path(__file__).parent / "grafana"

_F = "slipstream_frontend_"
_W = "slipstream_worker_"
_MODEL = 'model=~"$model"'
_WORKER = 'worker=~"$worker"'
_MODELS = Variable("model", f"{_F}input_sequence_tokens_count", "model")
_WORKERS = Variable("worker", f"{_W}requests_total", "worker")
_HIT_RATE = Panel(
    "KV hit rate",
    "The part of prompt tokens that no worker had to compute. Low with long shared prompts: look at Routing.",
    (ratio(f"{_F}cached_prompt_tokens_total", f"{_F}input_sequence_tokens_sum", _MODEL),),
    "percentunit",
)
_ERRORS = (
    Query(
        f'(sum(rate({_F}requests_total{{{_MODEL}, code=~"5..|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|UNKNOWN"}}'
        "[$__rate_interval])) or vector(0))"
        f" + (sum(rate({_F}broken_streams_total{{{_MODEL}}}[$__rate_interval])) or vector(0))",
        "failed",
    ),
)


def _stat(panel: Panel, title: str = "") -> Panel:
    return Panel(title or panel.title, panel.help, panel.queries, panel.unit, stat=True)


_TTFT = Panel(
    "Time to first token",
    "From a request's arrival to its first token. High: add prefill workers; compare with the stages below.",
    quantiles(f"{_F}time_to_first_token_seconds", _MODEL, 0.5, 0.9, 0.99),
    "s",
)
_ITL = Panel(
    "Inter-token latency",
    "Between tokens of one answer. High: add decode workers.",
    quantiles(f"{_F}inter_token_latency_seconds", _MODEL, 0.5, 0.9, 0.99),
    "s",
)
_READY = Panel(
    "Workers",
    "By role and state, as the control plane knows them.",
    (Query("sum by (role, state) (slipstream_registry_workers)", "{{role}} {{state}}"),),
    stacked=True,
)

OVERVIEW = Dashboard(
    "slipstream-overview",
    "Slipstream: cluster",
    "Is it well? Load, latency, errors and workers of the whole cluster.",
    (_MODELS,),
    (
        Row(
            "Now",
            (
                Panel("Requests", "Answered in a second.", (rate(f"{_F}requests_total", _MODEL),), "reqps", stat=True),
                Panel(
                    "Tokens",
                    "Generated in a second.",
                    (rate(f"{_F}completion_tokens_total", _MODEL),),
                    "ops",
                    stat=True,
                ),
                Panel(
                    "TTFT p99", _TTFT.help, quantiles(f"{_F}time_to_first_token_seconds", _MODEL, 0.99), "s", stat=True
                ),
                Panel(
                    "ITL p99", _ITL.help, quantiles(f"{_F}inter_token_latency_seconds", _MODEL, 0.99), "s", stat=True
                ),
                _stat(_HIT_RATE),
                Panel("Failed", "Requests that failed through no fault of their client.", _ERRORS, "reqps", stat=True),
            ),
        ),
        Row("Latency", (_TTFT, _ITL)),
        Row(
            "Load",
            (
                Panel(
                    "Requests by status",
                    "4xx are the clients' own; a rising rate of 5xx needs a look at the frontend's log.",
                    (rate(f"{_F}requests_total", _MODEL, "code"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens are the load on prefill, generated tokens that on decode.",
                    (
                        Query(rate(f"{_F}prompt_tokens_total", _MODEL).expr, "prompt"),
                        Query(rate(f"{_F}completion_tokens_total", _MODEL).expr, "generated"),
                    ),
                    "ops",
                ),
                Panel(
                    "Requests under way",
                    "Of those in flight, the ones that still wait for their first token are queued or in prefill.",
                    (
                        Query(f"sum({_F}requests_in_flight{{{_MODEL}}})", "in flight"),
                        Query(f"sum({_F}requests_awaiting_first_token{{{_MODEL}}})", "before first token"),
                        Query(f"sum({_W}requests_waiting)", "queued in engines"),
                    ),
                ),
            ),
        ),
        Row(
            "Shape",
            (
                Panel(
                    "Prompt length (ISL)",
                    "Tokens of a prompt.",
                    quantiles(f"{_F}input_sequence_tokens", _MODEL, 0.5, 0.9, 0.99),
                ),
                Panel(
                    "Answer length (OSL)",
                    "Tokens of a request's answers.",
                    quantiles(f"{_F}output_sequence_tokens", _MODEL, 0.5, 0.9, 0.99),
                ),
                Panel(
                    "Request duration",
                    "From arrival to the answer's last byte.",
                    quantiles(f"{_F}request_duration_seconds", _MODEL, 0.5, 0.9, 0.99),
                    "s",
                ),
            ),
        ),
        Row(
            "Workers",
            (
                _READY,
                Panel(
                    "KV cache use",
                    "By role: near 1 for long, requests wait for memory.",
                    (Query(f"avg by (role) ({_W}kv_usage_ratio)", "{{role}}"),),
                    "percentunit",
                ),
                Panel(
                    "The slow road",
                    "Prompts that decode computed although a prefill worker should have, by reason. Should be 0.",
                    (rate(f"{_F}fallbacks_total", by="reason"),),
                    "ops",
                ),
            ),
        ),
    ),
)

FRONTEND = Dashboard(
    "slipstream-frontend",
    "Slipstream: frontend",
    "Where a request's time goes before it is with the workers, and what became of it.",
    (_MODELS,),
    (
        Row(
            "Stages",
            (
                Panel(
                    "Stages, p99",
                    "receive: body read and checked; tokenize; route: the decision.",
                    quantiles(f"{_F}stage_seconds", "", 0.99, by="stage"),
                    "s",
                ),
                Panel(
                    "Stages, mean",
                    "All of it is this process' own work: high values mean that it needs more CPU.",
                    (
                        Query(
                            f"sum by (stage) (rate({_F}stage_seconds_sum[$__rate_interval]))"
                            f" / sum by (stage) (rate({_F}stage_seconds_count[$__rate_interval]))",
                            "{{stage}}",
                        ),
                    ),
                    "s",
                ),
                Panel(
                    "Prompt computed after",
                    "From dispatch to the computed prompt: the prefill worker's queue and its computation.",
                    quantiles(f"{_F}prefill_seconds", "", 0.5, 0.99),
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
                    (rate(f"{_F}requests_total", by="face, endpoint"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "In flight",
                    "By face and endpoint.",
                    (Query(f"sum by (face, endpoint) ({_F}requests_in_flight)", "{{face}} {{endpoint}}"),),
                ),
                Panel(
                    "Broken streams",
                    "Answers that ended in an error after they had begun.",
                    (rate(f"{_F}broken_streams_total", by="code"),),
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
                    (Query(f"sum by (class) ({_F}queue_requests)", "{{class}}"),),
                    stacked=True,
                ),
                Panel(
                    "Wait, p99",
                    "In the frontend's queue, by class.",
                    quantiles(f"{_F}queue_seconds", "", 0.99, by="class"),
                    "s",
                ),
                Panel(
                    "Let in, by tenant",
                    "Requests that went to the workers.",
                    (rate(f"{_F}admitted_total", by="tenant"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Refused and preempted",
                    "429 by class and reason. Batch alone is as it should be under load.",
                    (
                        rate(f"{_F}refused_total", by="class, reason"),
                        Query(rate(f"{_F}preempted_total").expr, "preempted"),
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
                    (rate(f"{_F}worker_failures_total", by="role, kind"),),
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
                    (Query(f"min by (instance) ({_F}registry_connected)", "{{instance}}"),),
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
                            f" and on (instance) {_F}registry_connected",
                            "{{instance}}",
                        ),
                    ),
                    "none",
                ),
                Panel(
                    "Memory",
                    "Resident. Should be flat.",
                    (Query(f"process_resident_memory_bytes and on (instance) {_F}registry_connected", "{{instance}}"),),
                    "bytes",
                ),
            ),
        ),
    ),
)

WORKERS = Dashboard(
    "slipstream-workers",
    "Slipstream: workers and transfers",
    "What each worker does, and how KV blocks travel between them.",
    (_WORKERS,),
    (
        Row(
            "Engines",
            (
                Panel(
                    "Running",
                    "Requests in the engine's batch.",
                    (Query(f"{_W}requests_running{{{_WORKER}}}", "{{worker}}"),),
                ),
                Panel(
                    "Waiting",
                    "Requests queued in the engine.",
                    (Query(f"{_W}requests_waiting{{{_WORKER}}}", "{{worker}}"),),
                ),
                Panel(
                    "KV cache use",
                    "Near 1 for long: requests wait for memory.",
                    (Query(f"{_W}kv_usage_ratio{{{_WORKER}}}", "{{worker}}"),),
                    "percentunit",
                ),
                Panel(
                    "Tokens",
                    "Computed prompt tokens (prefill), generated tokens (decode).",
                    (rate(f"{_W}tokens_total", _WORKER, "worker"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Where requests' time goes",
            (
                Panel(
                    "Stages, p99, prefill workers",
                    "queue: until anything was computed. transfer: from the computed prompt until it was taken over.",
                    quantiles(f"{_W}stage_seconds", f'role="prefill", {_WORKER}', 0.99, by="stage"),
                    "s",
                ),
                Panel(
                    "Stages, p99, decode workers",
                    "transfer: until the blocks were there, the prompt's computation included.",
                    quantiles(f"{_W}stage_seconds", f'role="decode", {_WORKER}', 0.99, by="stage"),
                    "s",
                ),
                Panel(
                    "Prompt tokens by where their KV came from",
                    "A decode worker computes at most one a request, unless transfers fail.",
                    (
                        Query(rate(f"{_W}prompt_tokens_computed_total", _WORKER, "role").expr, "{{role}} computed"),
                        Query(rate(f"{_W}prompt_tokens_cached_total", _WORKER, "role").expr, "{{role}} cached"),
                        Query(rate(f"{_W}prompt_tokens_received_total", _WORKER, "role").expr, "{{role}} received"),
                    ),
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Prefix cache hit rate",
                    "Of each worker's own cache.",
                    (ratio(f"{_W}prompt_tokens_cached_total", f"{_W}prompt_tokens_total", _WORKER, "worker"),),
                    "percentunit",
                ),
            ),
        ),
        Row(
            "Health",
            (
                Panel(
                    "Workers that are not well",
                    "suspect: worth a look. sick: fenced and replaced, as far as the budget goes.",
                    (
                        Query(f'sum by (state) (slipstream_worker_health{{state!="healthy", {_WORKER}}})', "{{state}}"),
                        Query("slipstream_health_fenced_workers", "fenced"),
                        Query("sum(slipstream_health_sick_in_service)", "sick, in service"),
                    ),
                ),
                Panel(
                    "Duration of the same work, over the peers' median",
                    "health.slow_factor is the limit.",
                    (Query(f"slipstream_health_slowness_ratio{{{_WORKER}}}", "{{worker}}"),),
                ),
            ),
        ),
        Row(
            "Transfers",
            (
                Panel(
                    "KV bytes by way",
                    "shm within a host, ucx or nixl between hosts.",
                    (rate("slipstream_kv_transfer_bytes_by_path_total", _WORKER, "path"),),
                    "Bps",
                    stacked=True,
                ),
                Panel(
                    "Transfers by result",
                    "After a failed one the prompt is computed by decode.",
                    (rate("slipstream_kv_transfers_total", _WORKER, "result"),),
                    "ops",
                ),
                Panel(
                    "Hidden and exposed",
                    "Of the time of transfers: hidden behind the prompt's computation, and felt by clients.",
                    (
                        Query(rate("slipstream_kv_transfer_hidden_seconds_total", _WORKER).expr, "hidden"),
                        Query(rate("slipstream_kv_transfer_exposed_seconds_total", _WORKER).expr, "exposed"),
                    ),
                    "none",
                ),
                Panel(
                    "Failures by cause",
                    "Should be 0.",
                    (
                        rate("slipstream_kv_transfer_failures_total", _WORKER, "cause"),
                        Query(rate("slipstream_kv_transfer_spans_resent_total", _WORKER).expr, "spans resent"),
                    ),
                    "ops",
                ),
            ),
        ),
        Row(
            "Leases and memory",
            (
                Panel(
                    "Leases held",
                    "Prompts whose blocks wait to be taken over.",
                    (Query(f"slipstream_kv_handoffs_held{{{_WORKER}}}", "{{worker}}"),),
                ),
                Panel(
                    "Leases by end",
                    "expired: nobody took or gave up the blocks in time.",
                    (rate("slipstream_kv_handoffs_total", _WORKER, "outcome"),),
                    "ops",
                ),
                Panel(
                    "Preemptions",
                    "Requests put back for want of KV blocks. Many: raise worker.kv_cache_bytes.",
                    (rate(f"{_W}preemptions_total", _WORKER, "worker"),),
                    "ops",
                ),
                Panel(
                    "Refused",
                    "Calls refused because the worker drains or is full.",
                    (rate(f"{_W}requests_refused_total", _WORKER, "worker"),),
                    "ops",
                ),
            ),
        ),
    ),
)

ROUTING = Dashboard(
    "slipstream-routing",
    "Slipstream: routing",
    "Whether requests go where their KV blocks are, and what it costs when they do not.",
    (_MODELS,),
    (
        Row("Hits", (_HIT_RATE, _TTFT)),
        Row(
            "Decisions",
            (
                Panel(
                    "Decision time",
                    "Of one routing decision.",
                    quantiles(f"{_F}stage_seconds", 'stage="route"', 0.5, 0.99),
                    "s",
                ),
                Panel(
                    "Routes by reason",
                    "docs/routing.md says what each reason means.",
                    (rate(f"{_F}routes_total", by="reason"),),
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Seen over predicted",
                    "Median. Near 1 is good; steadily far from it, the workers' profiles are not theirs.",
                    quantiles(f"{_F}prediction_ratio", "", 0.5, by="of"),
                    "none",
                ),
                Panel(
                    "Fallbacks by reason",
                    "Prompts that decode computed although a prefill worker should have.",
                    (rate(f"{_F}fallbacks_total", by="reason"),),
                    "ops",
                ),
                Panel(
                    "Load on workers",
                    "Requests running and waiting, by role: lines far apart within a role are an imbalance.",
                    (
                        Query(f"max by (role) ({_W}requests_open)", "{{role}} most"),
                        Query(f"min by (role) ({_W}requests_open)", "{{role}} least"),
                    ),
                ),
            ),
        ),
        Row(
            "Write-back",
            (
                Panel(
                    "Write-backs",
                    "Decode workers asked for what they have of a conversation; refused: the blocks were gone.",
                    (
                        Query(rate(f"{_F}write_backs_total").expr, "asked"),
                        Query(rate(f"{_F}write_backs_refused_total").expr, "refused"),
                    ),
                    "ops",
                ),
                Panel(
                    "Prompt tokens not computed again",
                    "Received by prefill workers from decode workers.",
                    (rate(f"{_F}write_back_tokens_total"),),
                    "ops",
                ),
            ),
        ),
    ),
)

DASHBOARDS = {
    "overview": OVERVIEW,
    "frontend": FRONTEND,
    "workers": WORKERS,
    "routing": ROUTING,
    "planner": PLANNER,
}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(render(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
