"""`slipstream planner recommend`: how many GPUs a load needs, and whether disaggregation is worth it for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.load_choice import LoadChoice
from slipstream.cli.load_flags import in_words, with_load
from slipstream.cli.show import examples
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from simulator.pool_trials import Pool
    from simulator.recommend import Recommendation
    from simulator.what_if import RecommendAsk

DEFAULT_PROFILE = "qwen3-32b-h200"
_OBJECTIVE = "What requests shall get"


def add_to(planner: typer.Typer) -> None:
    planner.command(
        epilog=examples(
            ("slipstream planner recommend --rate 8 --input-tokens 3000 --output-tokens 300", "for a steady load"),
            (
                "slipstream planner recommend --trace access.jsonl --profile llama-3.1-70b-h100 --ttft-s 1",
                "for what your frontends logged (log.access_log, log.access_log_blocks)",
            ),
            ("slipstream planner recommend --policy policy.yaml --rate 20 --json", "with a policy's objectives"),
        ),
    )(recommend)


@with_load
def recommend(
    choice: LoadChoice,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME",
            help="Workers to choose from: a packaged profile, all of one model and GPU (qwen3-32b-h200), or a file. "
            "Can be given several times.",
            show_default=DEFAULT_PROFILE,
        ),
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option("--max-gpus", min=1, max=1024, help="GPUs at most; the policy's, or 64.")
    ] = None,
    ttft_s: Annotated[
        float | None, typer.Option("--ttft-s", rich_help_panel=_OBJECTIVE, help="Time to first token; 2 when absent.")
    ] = None,
    itl_s: Annotated[
        float | None,
        typer.Option("--itl-s", rich_help_panel=_OBJECTIVE, help="Mean time between an answer's tokens; 0.05."),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option("--percentile", rich_help_panel=_OBJECTIVE, help="Of requests that keep each; 99."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy", metavar="FILE", rich_help_panel=_OBJECTIVE, help="A policy, for what is not given here."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", rich_help_panel=_OBJECTIVE, help="Of the policy; its first when absent.")
    ] = "",
    json_wanted: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the fewest GPUs that meet an objective under a load, with prefill workers and without, by simulation.

    Takes a minute or a few. Every worker of a pool is of one profile.
    """
    from simulator.what_if import answer_recommend
    from slipstream.cli.terminal import messages

    ask = _ask(
        choice, profile or [], policy, model, ttft_s=ttft_s, itl_s=itl_s, percentile=percentile, max_gpus=max_gpus
    )
    with messages().status("searching") as status:

        def said(pool: Pool) -> None:
            status.update(
                f"{pool.workers} x {pool.profile}: {pool.ttft_attainment:.1%} of first tokens, "
                f"{pool.itl_attainment:.1%} of answers in time"
            )

        answer = answer_recommend(ask, said)
    _print(answer, json_wanted=json_wanted)


def table(answer: Recommendation) -> Table:
    """The best pool of each profile and kind, the smallest first."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    percent = f"p{answer.objective.percentile:g}"
    shown.add_column("pool")
    shown.add_column("profile")
    for name in ("GPUs", f"TTFT {percent}", f"ITL {percent}", "in time", "goodput/GPU", "bears"):
        shown.add_column(name, justify="right")
    for pool in answer.best_of_each:
        final = next((one for one in (answer.disaggregated, answer.aggregated) if one and _same(one, pool)), None)
        style = "bold" if final and final.kind == answer.better else "" if pool.meets else "dim"
        shown.add_row(
            Text(f"{pool.workers}{'' if pool.meets else ' (not enough)'}"),
            Text(pool.profile),
            str(pool.gpus),
            f"{pool.ttft_s:.2f} s",
            f"{pool.itl_s * 1e3:.1f} ms",
            f"{pool.attainment:.1%}",
            f"{pool.goodput_per_gpu:.2f}/s",
            _margin(final.margin) if final else "",
            style=style,
        )
    return shown


def _print(answer: Recommendation, *, json_wanted: bool) -> None:
    from rich.text import Text

    from slipstream.cli.terminal import output

    if json_wanted:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(answer), indent=1).decode())  # noqa: T201
        return
    console, load, wanted = output(), answer.load, answer.objective
    console.print(Text(f"{answer.about}: {load.requests:,} requests in {load.duration_s:,.0f} s, "
                       f"{load.rate_per_s:.3g}/s, {load.input_tokens:,.0f} tokens in, {load.output_tokens:,.0f} out, "
                       f"at most {load.hit_rate:.0%} cached"), soft_wrap=True)  # fmt: skip
    console.print(
        f"to get: TTFT {wanted.ttft_s:g} s and {wanted.itl_s * 1e3:g} ms a token for {wanted.percentile:g}% each\n"
    )
    console.print(table(answer))
    verdict = {"none": "No pool", "disaggregated": "Disaggregated", "aggregated": "Aggregated"}[answer.better]
    console.print(Text.assemble("\n", (verdict, "bold"), f": {answer.because}."), soft_wrap=True)
    console.print(f"[dim]{answer.simulations} simulations[/dim]")


def _same(one: Pool, other: Pool) -> bool:
    return (one.profile, one.counts) == (other.profile, other.counts)


def _margin(margin: float) -> str:
    from simulator.recommend import MOST_MARGIN

    if not margin:
        return ""
    return f"over {margin:.1f}x" if margin > MOST_MARGIN * 0.9 else f"{margin:.2f}x"


def _ask(
    choice: LoadChoice, profiles: list[str], policy: Path | None, model: str, **given: float | int | None
) -> RecommendAsk:
    """What was given, else what the policy's strictest class says, else the defaults."""
    import msgspec

    from planner.policy_file import read_policy
    from simulator.what_if import RecommendAsk

    values: dict[str, object] = {"load": choice}
    if policy is not None:
        told = read_policy(policy)
        chosen = told.of(model) if model else told.models[0]
        if chosen is None:
            raise ConfigError(
                f"--model = {model} is not in {policy}: it has {', '.join(one.model for one in told.models)}"
            )
        strictest = min(chosen.objectives.values(), key=lambda each: each.ttft_s)
        values |= asdict(strictest) | {"max_gpus": told.gpu_budget}
        values |= {"profiles": (chosen.profile,)} if chosen.profile else {}
    elif model:
        raise ConfigError("--model names a model of --policy FILE")
    values |= {name: value for name, value in given.items() if value is not None}
    values |= {"profiles": tuple(profiles)} if profiles else {}
    try:
        return msgspec.convert(values, RecommendAsk)
    except msgspec.ValidationError as error:
        raise ConfigError(in_words(error), param="recommend") from None
