"""`slipstream clusters`: what a global frontend knows of its clusters."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.face_tls import api_key, http_address
from slipstream.cli.flags import select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import UnavailableError
from slipstream.security.http_ends import opened

if TYPE_CHECKING:
    from rich.table import Table

PANEL = "Use a cluster"
TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 16 << 20
_STYLES = {"up": "green", "probe": "yellow"}


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream clusters", "one row for each frontend of each cluster behind a global frontend"),
            ("slipstream clusters --json | jq '.clusters[].health'", "for programs"),
        ),
    )(clusters)


@with_settings(*select("api_key", "frontend.host", "frontend.http_port", "security.tls_folder"))
def clusters(
    loaded: LoadedConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a global frontend's clusters: health, the way there, how long a prompt would wait, what is cached."""
    content = fetch(http_address(loaded.settings), api_key(loaded.settings))
    if as_json:
        print(content.decode())  # noqa: T201
        return
    from slipstream.cli.terminal import output

    output().print(table(json.loads(content)["clusters"]))


def fetch(address: str, key: str | None = None) -> bytes:
    """What a global frontend says, as JSON.

    Raises:
        UnavailableError: nobody answers there, or it is no global frontend.
    """
    try:
        with opened(f"{address}/slipstream/v1/clusters", TIMEOUT_S, key) as answer:
            content: bytes = answer.read(_MAX_ANSWER_BYTES)
            return content
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise UnavailableError(
                f"{address} wants an API key with the scope `observe` (SLIPSTREAM_API_KEY)"
            ) from None
        raise UnavailableError(
            f"{address} answers with status {error.code}; is it a frontend of one cluster (see `slipstream status`)?"
        ) from None
    except OSError as error:
        raise UnavailableError(
            f"no global frontend answers at {address} ({error}); name its port with --frontend-http-port"
        ) from None


def table(rows: list[dict[str, Any]]) -> Table:
    """One row for each frontend."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("frontend", "health", "models"):
        shown.add_column(name)
    for name in ("round trip", "age", "in flight", "prefixes", "first token", "queued"):
        shown.add_column(name, justify="right")
    shown.add_column("why")
    for row in rows:
        models = row["state"]["models"] if row["state"] else []
        age_s = row["state_age_s"]
        shown.add_row(
            Text(row["endpoint"]),
            Text(row["health"], style=_STYLES.get(row["health"], "red")),
            Text(", ".join(one["name"] for one in models)),
            f"{row['round_trip_s'] * 1000:.1f} ms",
            "-" if age_s is None else f"{age_s:.1f} s",
            str(row["in_flight"]),
            str(row["prefixes"]),
            ", ".join(_first_token(one) for one in models),
            ", ".join(str(sum(one["queued"].values())) for one in models),
            Text(row["why"]),
        )
    return shown


def _first_token(model: dict[str, Any]) -> str:
    """Predicted for a prompt of 512 tokens, of which nothing is cached, after what waits now."""
    for tokens, seconds in model["ready_s"]:
        if tokens >= 512:
            return f"{seconds + model['wait_s'].get('realtime', 0.0):.2f} s"
    return "-"
