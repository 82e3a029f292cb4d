"""What several of Slipstream's dashboards show: panels, their queries' labels, and the names of metrics."""

from __future__ import annotations

from deploy.grafana_json import Panel, Query, Variable, quantiles, ratio

F = "slipstream_frontend_"
W = "slipstream_worker_"
MODEL = 'model=~"$model"'
MODELS = Variable("model", f"{F}input_sequence_tokens_count", "model")
HIT_RATE = Panel(
    "KV hit rate",
    "The part of prompt tokens that no worker had to compute. Low with long shared prompts: look at Routing.",
    (ratio(f"{F}cached_prompt_tokens_total", f"{F}input_sequence_tokens_sum", MODEL),),
    "percentunit",
)
ERRORS = (
    Query(
        f'(sum(rate({F}requests_total{{{MODEL}, code=~"5..|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|UNKNOWN"}}'
        "[$__rate_interval])) or vector(0))"
        f" + (sum(rate({F}broken_streams_total{{{MODEL}}}[$__rate_interval])) or vector(0))",
        "failed",
    ),
)

TTFT = Panel(
    "Time to first token",
    "From a request's arrival to its first token. High: add prefill workers; compare with the stages below.",
    quantiles(f"{F}time_to_first_token_seconds", MODEL, 0.5, 0.9, 0.99),
    "s",
)
ITL = Panel(
    "Inter-token latency",
    "Between tokens of one answer. High: add decode workers.",
    quantiles(f"{F}inter_token_latency_seconds", MODEL, 0.5, 0.9, 0.99),
    "s",
)
READY = Panel(
    "Workers",
    "By role and state, as the control plane knows them.",
    (Query("sum by (role, state) (slipstream_registry_workers)", "{{role}} {{state}}"),),
    stacked=True,
)
