"""`slipstream planner policy` and `apply`: a policy file to start from, checked, and put in force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.flags import CONTROL_PLANE, select, with_settings
from slipstream.cli.planner_calls import TIMEOUT_S, as_json, ask_planner
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from slipstream.v1.planner_pb2 import ApplyReply


def add_to(planner: typer.Typer) -> None:
    planner.command(
        epilog=examples(
            ("slipstream planner policy > policy.yaml", "a commented policy to start from"),
            ("slipstream planner policy policy.yaml", "check a file; errors name the line"),
            ("slipstream planner policy --schema > policy.schema.json", "for editors that complete YAML"),
        ),
    )(policy)
    planner.command(
        epilog=examples(
            ("slipstream planner apply policy.yaml", "show what changes, and put it in force"),
            ("slipstream planner apply policy.yaml --dry-run", "only show what would change"),
        ),
    )(apply)


def policy(
    file: Annotated[Path | None, typer.Argument(help="A policy to check.", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the file's JSON Schema.")] = False,
) -> None:
    """Print a commented scaling policy, or check one."""
    from planner.policy_file import EXAMPLE, read_policy

    if schema:
        from planner.policy_schema import json_schema

        if file is not None:
            raise ConfigError("a file and --schema exclude each other")
        print(json.dumps(json_schema(), indent=2))  # noqa: T201
    elif file is None:
        print(EXAMPLE.read_text(encoding="utf-8"), end="")  # noqa: T201
    else:
        objectives = read_policy(file)
        models = ", ".join(one.model for one in objectives.models)
        print(f"{file}: right; {objectives.gpu_budget} GPUs for {models}")  # noqa: T201


@with_settings(*select(*CONTROL_PLANE))
def apply(
    loaded: LoadedConfig,
    file: Annotated[Path, typer.Argument(help="The policy file (YAML).", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put a scaling policy in force: from the planner's next decision on, and until it is restarted."""
    from planner.policy_file import parse_policy
    from slipstream.v1.planner_pb2 import ApplyReply, ApplyRequest
    from slipstream.yaml_nodes import read_text

    text = read_text(file)
    parse_policy(text, str(file))
    request = ApplyRequest(policy_yaml=text, dry_run=dry_run, name=str(file))
    address = loaded.settings.control_plane.address
    reply = ask_planner(address, lambda stub: stub.Apply(request, timeout=TIMEOUT_S), ApplyReply)
    if json_wanted:
        print(as_json(reply))  # noqa: T201
        return
    _print_changes(reply)


def _print_changes(reply: ApplyReply) -> None:
    from rich.table import Table
    from rich.text import Text

    from slipstream.cli.terminal import output

    console = output()
    if not reply.changes:
        console.print("This policy is in force already.")
        return
    table = Table("setting", "before", "after", box=None, pad_edge=False, header_style="bold")
    for change in reply.changes:
        table.add_row(
            Text(change.setting), Text(change.before or "-", style="red"), Text(change.after or "-", style="green")
        )
    console.print(table)
    console.print("In force from the next decision on." if reply.applied else "Nothing was changed (--dry-run).")
