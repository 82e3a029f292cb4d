"""The dashboard of the workers: what each does, and how KV blocks travel between them."""

from __future__ import annotations

from deploy.dashboard_parts import W
from deploy.grafana_json import Dashboard, Panel, Query, Row, Variable, quantiles, rate, ratio

_WORKER = 'worker=~"$worker"'
_WORKERS = Variable("worker", f"{W}requests_total", "worker")

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
                    (Query(f"{W}requests_running{{{_WORKER}}}", "{{worker}}"),),
                ),
                Panel(
                    "Waiting",
                    "Requests queued in the engine.",
                    (Query(f"{W}requests_waiting{{{_WORKER}}}", "{{worker}}"),),
                ),
                Panel(
                    "KV cache use",
                    "Near 1 for long: requests wait for memory.",
                    (Query(f"{W}kv_usage_ratio{{{_WORKER}}}", "{{worker}}"),),
                    "percentunit",
                ),
                Panel(
                    "Tokens",
                    "Computed prompt tokens (prefill), generated tokens (decode).",
                    (rate(f"{W}tokens_total", _WORKER, "worker"),),
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
                    quantiles(f"{W}stage_seconds", f'role="prefill", {_WORKER}', 0.99, by="stage"),
                    "s",
                ),
                Panel(
                    "Stages, p99, decode workers",
                    "transfer: until the blocks were there, the prompt's computation included.",
                    quantiles(f"{W}stage_seconds", f'role="decode", {_WORKER}', 0.99, by="stage"),
                    "s",
                ),
                Panel(
                    "Prompt tokens by where their KV came from",
                    "A decode worker computes at most one a request, unless transfers fail.",
                    (
                        Query(rate(f"{W}prompt_tokens_computed_total", _WORKER, "role").expr, "{{role}} computed"),
                        Query(rate(f"{W}prompt_tokens_cached_total", _WORKER, "role").expr, "{{role}} cached"),
                        Query(rate(f"{W}prompt_tokens_received_total", _WORKER, "role").expr, "{{role}} received"),
                    ),
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Prefix cache hit rate",
                    "Of each worker's own cache.",
                    (ratio(f"{W}prompt_tokens_cached_total", f"{W}prompt_tokens_total", _WORKER, "worker"),),
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
                    (rate(f"{W}preemptions_total", _WORKER, "worker"),),
                    "ops",
                ),
                Panel(
                    "Refused",
                    "Calls refused because the worker drains or is full.",
                    (rate(f"{W}requests_refused_total", _WORKER, "worker"),),
                    "ops",
                ),
            ),
        ),
    ),
)
