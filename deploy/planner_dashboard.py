"""The dashboard of the planner: what it wants and why, beside what there is and what comes of it."""

from __future__ import annotations

from deploy.grafana_json import Dashboard, Panel, Query, Row, Variable, rate

_P = "slipstream_planner_"
_MODEL = 'model=~"$model"'

PLANNER = Dashboard(
    "slipstream-planner",
    "Slipstream: planner",
    "How many workers it wants, what it predicts, sees and does. `slipstream planner explain` has the rest.",
    (Variable("model", f"{_P}target_workers", "model"),),
    (
        Row(
            "Workers",
            (
                Panel(
                    "Asked and ready",
                    "By role. Apart for longer than a start takes: starts fail, or there is no room.",
                    (
                        Query(f"max by (model, role) ({_P}target_workers{{{_MODEL}}})", "{{model}} {{role}} asked"),
                        Query(f"max by (model, role) ({_P}actual_workers{{{_MODEL}}})", "{{model}} {{role}} ready"),
                    ),
                ),
                Panel(
                    "Actions",
                    "Starts, drains and flips. All three at a steady rate: it oscillates.",
                    (rate(f"{_P}actions_total", by="kind, result"),),
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Decisions, and who acts",
                    "One planner acts. None for a minute: nobody changes the number of workers.",
                    (
                        rate(f"{_P}decisions_total"),
                        Query(f"sum({_P}leader)", "planners that act"),
                        Query(f"sum(rate({_P}errors_total[$__rate_interval]))", "errors"),
                    ),
                    "none",
                ),
            ),
        ),
        Row(
            "Predicted and seen",
            (
                Panel(
                    "Time to first token",
                    "At the objective's percentile. Predicted of the workers that there are; far below what is seen: "
                    "the workers are not as their profile.",
                    (
                        Query(f"max by (model) ({_P}predicted_ttft_seconds{{{_MODEL}}})", "{{model}} predicted"),
                        Query(f"max by (model, class) ({_P}seen_ttft_seconds{{{_MODEL}}})", "{{model}} {{class}} seen"),
                        Query(f"max by (model, class) ({_P}ttft_limit_seconds{{{_MODEL}}})", "{{class}} limit"),
                    ),
                    "s",
                ),
                Panel(
                    "Time between tokens",
                    "The same.",
                    (
                        Query(f"max by (model) ({_P}predicted_itl_seconds{{{_MODEL}}})", "{{model}} predicted"),
                        Query(f"max by (model, class) ({_P}seen_itl_seconds{{{_MODEL}}})", "{{model}} {{class}} seen"),
                        Query(f"max by (model, class) ({_P}itl_limit_seconds{{{_MODEL}}})", "{{class}} limit"),
                    ),
                    "s",
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Arrivals, forecast and seen",
                    "Prepared for within the horizon, and what came: the mean over a quarter of an hour.",
                    (
                        Query(
                            f"max by (model, class) ({_P}forecast_requests_per_second{{{_MODEL}}})",
                            "{{model}} {{class}} forecast",
                        ),
                        Query(
                            f"max by (model, class) ({_P}seen_requests_per_second{{{_MODEL}}})",
                            "{{model}} {{class}} seen",
                        ),
                    ),
                    "reqps",
                ),
                Panel(
                    "Caution",
                    "1: more were late than the objective allows, all of the forecast's bound is prepared for; "
                    "0: what is expected; below: more were in time than it asks for.",
                    (Query(f"max by (model) ({_P}caution{{{_MODEL}}})", "{{model}}"),),
                    "none",
                ),
                Panel(
                    "Prompts that wait",
                    "In seconds of one worker's time.",
                    (Query(f"max by (model) ({_P}backlog_seconds{{{_MODEL}}})", "{{model}}"),),
                    "s",
                ),
            ),
        ),
    ),
)
