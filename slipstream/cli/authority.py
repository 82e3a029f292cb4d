"""`slipstream ca`: makes, shows and renews the certificates of a cluster, and its token."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Optional

import typer

from slipstream.cli.show import examples
from slipstream.errors import ConfigError

PANEL = "A cluster"

_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the certificates are.", show_default=False)]
_Days = Annotated[float, typer.Option("--days", min=0.001, max=825, help="How long certificates are good for.")]
_Hosts = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation
    typer.Option("--host", metavar="NAME", help="A host name or address of the public faces; repeatable."),
]


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            ("slipstream ca init certificates", "everything that a cluster needs"),
            ("slipstream up --tls certificates", "and a cluster that uses it"),
            ("slipstream ca init certificates --host llm.example.com", "clients find the faces under that name"),
        )
    )(init)
    app.command(
        epilog=examples(
            ("slipstream ca issue certificates --role worker --name gpu-7 --to gpu-7", "a worker's own, in gpu-7/"),
            ("slipstream ca issue certificates --role client --name alice --to alice", "a client of the public faces"),
        )
    )(issue)
    app.command(epilog=examples(("slipstream ca show certificates", "whose they are, and when they end")))(show)
    app.command(
        epilog=examples(
            ("slipstream ca renew certificates", "all of them; nothing has to be restarted"),
            ("slipstream ca renew certificates --within-days 10", "for a timer: those that end soon"),
            ("slipstream ca renew certificates --authority", "what signs them too"),
        )
    )(renew)
    app.command(epilog=examples(("slipstream ca token cluster.token", "a secret that components share")))(token)


def init(
    folder: _Folder,
    cluster: Annotated[
        str, typer.Option("--cluster", help="The cluster's name, which its certificates bear.")
    ] = "slipstream",
    hosts: _Hosts = None,
    days: _Days = 30.0,
    authority_days: Annotated[
        float, typer.Option("--authority-days", min=0.001, max=3650, help="How long the authority is good for.")
    ] = 365.0,
) -> None:
    """Make an authority, a certificate for each role, and one for the public faces."""
    from slipstream.security.authority import AUTHORITY_FOLDER, make_everything

    make_everything(folder, cluster, hosts or [], days=days, authority_days=authority_days)
    _print_all(folder)
    print(f"\nKeep {folder / AUTHORITY_FOLDER} away from the machines that serve. Then: slipstream up --tls {folder}")  # noqa: T201


def issue(
    folder: _Folder,
    role: Annotated[str, typer.Option("--role", help="worker, frontend, ...; `face` or `client` for the public side.")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where the certificate and its key are put.")],
    name: Annotated[str, typer.Option("--name", help="Of the component, among those of its role.")] = "any",
    hosts: _Hosts = None,
    days: _Days = 30.0,
) -> None:
    """Make one more certificate, for one component, a frontend's public face, or a client."""
    from slipstream.security.authority import Authority, face_hosts
    from slipstream.security.identity import CA_FILE, FACE, pair
    from slipstream.security.names import component_name

    authority, files = Authority.load(folder), pair(to, role)
    if role == FACE:
        made = authority.issue_face(face_hosts(hosts or []), days=days, to=files)
    elif role == "client":
        made = authority.issue_client(name, days=days, to=files)
    else:
        made = authority.issue_component(component_name(authority.cluster, role, name), days=days, to=files)
    if not (to / CA_FILE).exists():
        (to / CA_FILE).write_bytes((folder / CA_FILE).read_bytes())
    print(f"{made} with {files[1].name} and {CA_FILE}")  # noqa: T201


def show(folder: _Folder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show a folder's certificates: whose they are, and when they end."""
    _print_all(folder, as_json=as_json)


def renew(
    folder: _Folder,
    days: _Days = 30.0,
    within_days: Annotated[
        Optional[float],  # noqa: UP045 - typer reads the annotation
        typer.Option("--within-days", min=0, help="Only those that end within so many days."),
    ] = None,
    authority: Annotated[
        bool, typer.Option("--authority", help="Also the authority; the old one is trusted until it ends.")
    ] = False,
) -> None:
    """Make a folder's certificates anew, with new keys; running processes take them without a restart."""
    from slipstream.security import authority as authorities

    for path in authorities.renew(folder, days=days, within_days=within_days, new_authority=authority):
        print(f"renewed {path}")  # noqa: T201


def token(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of the token, or of tokens to add it to.")],
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Put a new one before those that are there, which stay good.")
    ] = False,
) -> None:
    """Make a cluster token, the lighter alternative to certificates (security.cluster_token_file)."""
    from slipstream.security.authority import new_token, write_secret
    from slipstream.security.files import read_tokens

    if file.exists() and not rotate:
        raise ConfigError(f"{file} exists already; --rotate puts a new token before those in it", param="file")
    old = read_tokens(file) if file.exists() else ()
    write_secret(file, "".join(f"{one}\n" for one in (new_token(), *old)))
    print(f"{file}: {len(old) + 1} token{'s' if old else ''}")  # noqa: T201


def _print_all(folder: Path, *, as_json: bool = False) -> None:
    from slipstream.security.authority import shown

    found, now = shown(folder), datetime.now(UTC)
    if as_json:
        plain = [
            {
                "file": str(one.path),
                "subject": one.subject,
                "names": one.names,
                "not_after": one.not_after.isoformat(),
                "seconds_left": round((one.not_after - now).total_seconds()),
                "serial": one.serial,
            }
            for one in found
        ]
        print(json.dumps(plain, indent=2))  # noqa: T201
        return
    from rich.table import Table
    from rich.text import Text

    from slipstream.cli.terminal import output

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("file", "ends in", "names"):
        table.add_column(title)
    for one in found:
        left_days = (one.not_after - now).total_seconds() / 86400
        ends = Text(f"{left_days:.1f} days" if left_days > 0 else "ended", style="red" if left_days <= 3 else "")
        table.add_row(Text(one.path.name), ends, Text("\n".join(one.names) or one.subject))
    output().print(table)
