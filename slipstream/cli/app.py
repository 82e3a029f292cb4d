"""The commands of `slipstream`, and how errors end them: one red line, no traceback, exit code 2 or 1."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slipstream import __version__
from slipstream.cli import (
    authority,
    chat,
    clusters,
    explain,
    keys,
    local,
    planner_decisions,
    planner_policy,
    planner_recommend,
    planner_simulate,
    prefetch,
    profile,
    roles,
    show,
    status,
    top,
    transfer,
)
from slipstream.errors import ConfigError, SlipstreamError


class _ReportingGroup(TyperGroup):
    """Turns the errors of Slipstream into a message and an exit code; everything else is a bug and keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (SlipstreamError, BaseExceptionGroup) as error:
            known = _slipstream_errors(error)
            if not known:
                raise
            _print_errors(known)
            raise typer.Exit(2 if any(isinstance(each, ConfigError) for each in known) else 1) from None


app = typer.Typer(
    cls=_ReportingGroup,
    name="slipstream",
    help="Serve language models from separate prefill and decode workers.",
    epilog=show.examples(
        ("slipstream demo", "start a cluster here, ask one question, and account for the answer"),
        ("slipstream up --prefill 2 --decode 2", "start a cluster here and keep it until Ctrl-C"),
        ("slipstream chat", "talk to it, from another terminal"),
        ("slipstream top", "see what it does, live"),
        ("slipstream COMMAND --help", "all flags of a command, with examples"),
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=True,
)
planner = typer.Typer(help="The control plane, and the planner of worker counts in it.", no_args_is_help=True)
ways = typer.Typer(help="The ways of KV blocks between workers.", no_args_is_help=True)
api_keys = typer.Typer(help="API keys: who may use the frontends, and how much.", no_args_is_help=True)
configuration = typer.Typer(help="The configuration.", no_args_is_help=True)
certificates = typer.Typer(help="Certificates and the token of a cluster.", no_args_is_help=True)

local.add_to(app)
chat.add_to(app)
status.add_to(app)
clusters.add_to(app)
top.add_to(app)
explain.add_to(app)
prefetch.add_to(app)
profile.add_to(app)
transfer.add_to(ways)
roles.add_to(app, planner)
planner_policy.add_to(planner)
planner_simulate.add_to(planner)
planner_recommend.add_to(planner)
planner_decisions.add_to(planner)
show.add_to(app, configuration)
authority.add_to(certificates)
keys.add_to(api_keys)
app.add_typer(ways, name="transfer", rich_help_panel=transfer.PANEL)
app.add_typer(certificates, name="ca", rich_help_panel=authority.PANEL)
app.add_typer(planner, name="planner", rich_help_panel=roles.PANEL)
app.add_typer(api_keys, name="keys", rich_help_panel=keys.PANEL)
app.add_typer(configuration, name="config", rich_help_panel=show.PANEL)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"slipstream {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def _slipstream_errors(error: BaseException) -> list[SlipstreamError]:
    """The errors in a tree of exception groups; none when anything else is among them."""
    if isinstance(error, SlipstreamError):
        return [error]
    if not isinstance(error, BaseExceptionGroup):
        return []
    found = [_slipstream_errors(each) for each in error.exceptions]
    return [each for group in found for each in group] if all(found) else []


def _print_errors(errors: list[SlipstreamError]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    for error in errors:
        first, _, rest = error.message.partition("\n")
        text = Text("error: ", style="bold red").append(first, style="red")
        if rest:
            text.append(f"\n{rest}", style="red" if isinstance(error, ConfigError) else "not bold default")
        console.print(text, soft_wrap=True, highlight=False)
