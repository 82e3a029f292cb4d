"""Slipstream's Grafana dashboards. `python -m deploy.dashboards` writes them to deploy/grafana.

A test checks every query against the metrics of a running cluster.
"""

from __future__ import annotations

from pathlib import Path

from deploy.dashboard_parts import ERRORS, HIT_RATE, ITL, MODEL, MODELS, READY, TTFT, F, W
from deploy.frontend_dashboard import FRONTEND
from deploy.grafana_json import Dashboard, Panel, Query, Row, quantiles, rate, render
from deploy.planner_dashboard import PLANNER
from deploy.worker_dashboard import WORKERS

FOLDER = Path(__file__).parent / "grafana"


def _stat(panel: Panel, title: str = "") -> Panel:
    return Panel(title or panel.title, panel.help, panel.queries, panel.unit, stat=True)


OVERVIEW = Dashboard(
    "slipstream-overview",
    "Slipstream: cluster",
    "Is it well? Load, latency, errors and workers of the whole cluster.",
    (MODELS,),
    (
        Row(
            "Now",
            (
                Panel("Requests", "Answered in a second.", (rate(f"{F}requests_total", MODEL),), "reqps", stat=True),
                Panel(
                    "Tokens",
                    "Generated in a second.",
                    (rate(f"{F}completion_tokens_total", MODEL),),
                    "ops",
                    stat=True,
                ),
                Panel("TTFT p99", TTFT.help, quantiles(f"{F}time_to_first_token_seconds", MODEL, 0.99), "s", stat=True),
                Panel("ITL p99", ITL.help, quantiles(f"{F}inter_token_latency_seconds", MODEL, 0.99), "s", stat=True),
                _stat(HIT_RATE),
                Panel("Failed", "Requests that failed through no fault of their client.", ERRORS, "reqps", stat=True),
            ),
        ),
        Row("Latency", (TTFT, ITL)),
        Row(
            "Load",
            (
                Panel(
                    "Requests by status",
                    "4xx are the clients' own; a rising rate of 5xx needs a look at the frontend's log.",
                    (rate(f"{F}requests_total", MODEL, "code"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens are the load on prefill, generated tokens that on decode.",
                    (
                        Query(rate(f"{F}prompt_tokens_total", MODEL).expr, "prompt"),
                        Query(rate(f"{F}completion_tokens_total", MODEL).expr, "generated"),
                    ),
                    "ops",
                ),
                Panel(
                    "Requests under way",
                    "Of those in flight, the ones that still wait for their first token are queued or in prefill.",
                    (
                        Query(f"sum({F}requests_in_flight{{{MODEL}}})", "in flight"),
                        Query(f"sum({F}requests_awaiting_first_token{{{MODEL}}})", "before first token"),
                        Query(f"sum({W}requests_waiting)", "queued in engines"),
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
                    quantiles(f"{F}input_sequence_tokens", MODEL, 0.5, 0.9, 0.99),
                ),
                Panel(
                    "Answer length (OSL)",
                    "Tokens of a request's answers.",
                    quantiles(f"{F}output_sequence_tokens", MODEL, 0.5, 0.9, 0.99),
                ),
                Panel(
                    "Request duration",
                    "From arrival to the answer's last byte.",
                    quantiles(f"{F}request_duration_seconds", MODEL, 0.5, 0.9, 0.99),
                    "s",
                ),
            ),
        ),
        Row(
            "Workers",
            (
                READY,
                Panel(
                    "KV cache use",
                    "By role: near 1 for long, requests wait for memory.",
                    (Query(f"avg by (role) ({W}kv_usage_ratio)", "{{role}}"),),
                    "percentunit",
                ),
                Panel(
                    "The slow road",
                    "Prompts that decode computed although a prefill worker should have, by reason. Should be 0.",
                    (rate(f"{F}fallbacks_total", by="reason"),),
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
    (MODELS,),
    (
        Row("Hits", (HIT_RATE, TTFT)),
        Row(
            "Decisions",
            (
                Panel(
                    "Decision time",
                    "Of one routing decision.",
                    quantiles(f"{F}stage_seconds", 'stage="route"', 0.5, 0.99),
                    "s",
                ),
                Panel(
                    "Routes by reason",
                    "docs/routing.md says what each reason means.",
                    (rate(f"{F}routes_total", by="reason"),),
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Seen over predicted",
                    "Median. Near 1 is good; steadily far from it, the workers' profiles are not theirs.",
                    quantiles(f"{F}prediction_ratio", "", 0.5, by="of"),
                    "none",
                ),
                Panel(
                    "Fallbacks by reason",
                    "Prompts that decode computed although a prefill worker should have.",
                    (rate(f"{F}fallbacks_total", by="reason"),),
                    "ops",
                ),
                Panel(
                    "Load on workers",
                    "Requests running and waiting, by role: lines far apart within a role are an imbalance.",
                    (
                        Query(f"max by (role) ({W}requests_open)", "{{role}} most"),
                        Query(f"min by (role) ({W}requests_open)", "{{role}} least"),
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
                        Query(rate(f"{F}write_backs_total").expr, "asked"),
                        Query(rate(f"{F}write_backs_refused_total").expr, "refused"),
                    ),
                    "ops",
                ),
                Panel(
                    "Prompt tokens not computed again",
                    "Received by prefill workers from decode workers.",
                    (rate(f"{F}write_back_tokens_total"),),
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
