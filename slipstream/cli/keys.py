"""`slipstream keys`: makes API keys, shows them, takes them back. The plain key is printed once, by who makes it."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from slipstream.cli.flags import select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from frontend.keys.entries import KeyEntry

PANEL = "Configuration"
_FLAGS = select("security.keys_file", own={"security"})
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"(\d+)([smhd])")
_IdArgument = Annotated[str, typer.Argument(help="A key's id, as `slipstream keys list` shows it.", metavar="ID")]
_PerMinute = Optional[int]  # noqa: UP045 - typer reads the annotation
_Text = Optional[str]  # noqa: UP045
_Texts = Optional[list[str]]  # noqa: UP045


def add_to(keys: typer.Typer) -> None:
    keys.command(
        epilog=examples(
            ("slipstream keys create --keys-file keys.yaml --tenant acme", "for all models, classes, at any rate"),
            (
                "slipstream keys create --tenant crawler --class batch --requests-per-minute 600 --expires 90d",
                "for batch requests, up to 600 a minute, for 90 days",
            ),
            ("slipstream keys create --tenant prometheus --scope observe", "to read /metrics with"),
        )
    )(create)
    keys.command("list", epilog=examples(("slipstream keys list --json", "for programs")))(list_keys)
    keys.command(epilog=examples(("slipstream keys show k3v9x2m8q0ab", "all that is known of a key")))(show)
    keys.command(
        epilog=examples(("slipstream keys rotate k3v9x2m8q0ab --overlap 24h", "both are valid for a day from now"))
    )(rotate)
    keys.command(epilog=examples(("slipstream keys revoke k3v9x2m8q0ab", "it is valid no more, at once")))(revoke)
    keys.command(epilog=examples(("slipstream keys verify < key.txt", "which key it is, and whether it is valid")))(
        verify
    )


@with_settings(*_FLAGS)
def create(
    loaded: LoadedConfig,
    tenant: Annotated[str, typer.Option("--tenant", help="Whose it is.")] = "default",
    name: Annotated[str, typer.Option("--name", help="What it is for, for people.")] = "",
    scope: Annotated[_Texts, typer.Option("--scope", help="inference (when absent), observe; may be repeated.")] = None,
    model: Annotated[
        _Texts, typer.Option("--model", help="A model's name, with * for anything; may be repeated.")
    ] = None,
    service_class: Annotated[
        _Texts, typer.Option("--class", help="realtime, nearline, batch; may be repeated. All when absent.")
    ] = None,
    requests_per_minute: Annotated[_PerMinute, typer.Option("--requests-per-minute", show_default=False)] = None,
    input_tokens_per_minute: Annotated[
        _PerMinute, typer.Option("--input-tokens-per-minute", show_default=False)
    ] = None,
    output_tokens_per_minute: Annotated[
        _PerMinute, typer.Option("--output-tokens-per-minute", show_default=False)
    ] = None,
    burst_s: Annotated[float, typer.Option("--burst-s", help="Seconds' worth that may come at once.")] = 60.0,
    reserve_output_tokens: Annotated[
        int, typer.Option("--reserve-output-tokens", help="Held for an answer for which a client names no max_tokens.")
    ] = 512,
    streams: Annotated[_PerMinute, typer.Option("--streams", help="Requests at once.", show_default=False)] = None,
    connections: Annotated[
        _PerMinute, typer.Option("--connections", help="Connections at once.", show_default=False)
    ] = None,
    not_before: Annotated[
        _Text, typer.Option("--not-before", help="A time, or from now, as 2h.", show_default=False)
    ] = None,
    expires: Annotated[
        _Text, typer.Option("--expires", help="A time, or from now, as 90d.", show_default=False)
    ] = None,
) -> None:
    """Make a key and print it: now, and never again."""
    from frontend.keys import edits, key_file
    from frontend.keys.entries import CLASSES, parsed
    from frontend.keys.secret import new_key

    path, now, key = _path(loaded), _now(), new_key()
    limits = {
        "requests_per_minute": requests_per_minute,
        "input_tokens_per_minute": input_tokens_per_minute,
        "output_tokens_per_minute": output_tokens_per_minute,
        "burst_s": burst_s,
        "reserve_output_tokens": reserve_output_tokens,
        "streams": streams,
        "connections": connections,
    }
    wanted = {
        "id": key.key_id,
        "sha256": key.sha256,
        "tenant": tenant,
        "name": name,
        "scopes": scope or ("inference",),
        "models": model or ("*",),
        "classes": service_class or CLASSES,
        "limits": limits,
        "not_before": _moment(not_before, now, "--not-before"),
        "expires": _moment(expires, now, "--expires"),
    }
    entry: KeyEntry = parsed({"keys": [wanted]}, "this key").keys[0]
    with key_file.changing(path) as versions:
        made = edits.created(versions[-1], entry, key, now)
        versions.append(made.content)
    _tell_new(made.entry, path)
    print(key.plain)  # noqa: T201


@with_settings(*_FLAGS)
def rotate(
    loaded: LoadedConfig,
    key_id: _IdArgument,
    overlap: Annotated[str, typer.Option("--overlap", help="How long the old one goes on, as 24h.")] = "24h",
) -> None:
    """Make a new key that may do the same as an old one, which ends after a while, and print it, this once."""
    from frontend.keys import edits, key_file
    from frontend.keys.secret import new_key

    path, now, key = _path(loaded), _now(), new_key()
    with key_file.changing(path) as versions:
        made = edits.rotated(versions[-1], key_id, key, now, _duration(overlap, "--overlap"))
        versions.append(made.content)
    _tell_new(made.entry, path)
    _tell(f"Key {key_id} ends at {made.content.entry(key_id).expires}.")
    print(key.plain)  # noqa: T201


@with_settings(*_FLAGS)
def revoke(loaded: LoadedConfig, key_id: _IdArgument) -> None:
    """Take a key back. Frontends refuse it as soon as they have reread the file (security.keys_check_s)."""
    from frontend.keys import edits, key_file

    path = _path(loaded)
    with key_file.changing(path) as versions:
        versions.append(edits.revoked(versions[-1], key_id, _now()))
    _tell(f"Key {key_id} is revoked in {path}.")


@with_settings(*_FLAGS)
def list_keys(
    loaded: LoadedConfig, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show all keys: whose they are, what they may do, and whether they are valid."""
    from frontend.keys import key_file

    content, now = key_file.read(_path(loaded)), _now()
    if as_json:
        print(json.dumps([_plain(one, now) for one in content.keys], indent=2))  # noqa: T201
        return
    from rich.table import Table
    from rich.text import Text

    from slipstream.cli.terminal import output

    table = Table("id", "tenant", "name", "state", "expires", "scopes", "classes", "models", "limits", box=None,
                  pad_edge=False, header_style="bold")  # fmt: skip
    for one in content.keys:
        state = one.state(now)
        limits = one.limits.model_dump(exclude_defaults=True)
        table.add_row(
            one.id,
            Text(one.tenant),
            Text(one.name),
            Text(state, style="green" if state == "valid" else "red"),
            "-" if one.expires is None else f"{one.expires:%Y-%m-%d %H:%M}",
            ", ".join(one.scopes),
            ", ".join(one.classes),
            Text(", ".join(one.models)),
            ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "-",
        )
    output().print(table)


@with_settings(*_FLAGS)
def show(loaded: LoadedConfig, key_id: _IdArgument) -> None:
    """Show all that is known of a key, as JSON. The key itself is not."""
    from frontend.keys import key_file

    print(json.dumps(_plain(key_file.read(_path(loaded)).entry(key_id), _now()), indent=2))  # noqa: T201


@with_settings(*_FLAGS)
def verify(loaded: LoadedConfig) -> None:
    """Read a key from standard input, where no other process sees it, and say which one it is. Exits with 1 when it is
    not valid."""
    from frontend.keys import key_file
    from frontend.keys.keyring import Keyring

    ring = Keyring(key_file.read(_path(loaded)), loaded.settings.admission.tenants)
    key = ring.find(sys.stdin.readline(1024).strip(), _now().timestamp())
    print(f"{key.key_id}: valid, tenant {key.tenant}")  # noqa: T201


def _path(loaded: LoadedConfig) -> Path:
    path = loaded.settings.security.keys_file
    if path is None:
        raise ConfigError("which file? Give --keys-file, or set security.keys_file", param="security.keys_file")
    return path


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _moment(said: str | None, now: datetime, flag: str) -> datetime | None:
    if said is None:
        return None
    if _DURATION.fullmatch(said):
        return now + _duration(said, flag)
    try:
        moment = datetime.fromisoformat(said)
    except ValueError:
        raise ConfigError(f"{flag} = {said} is neither a time (2027-01-31T12:00:00Z) nor a duration (90d)") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _duration(said: str, flag: str) -> timedelta:
    found = _DURATION.fullmatch(said)
    if found is None:
        raise ConfigError(f"{flag} = {said} is no duration: a number with s, m, h or d, as 24h")
    try:
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError:
        raise ConfigError(f"{flag} = {said} is too long") from None


def _plain(entry: KeyEntry, now: datetime) -> dict[str, object]:
    return entry.model_dump(mode="json") | {"state": entry.state(now)}


def _tell_new(entry: KeyEntry, path: Path) -> None:
    _tell(f"Key {entry.id} of tenant {entry.tenant} is in {path}. It is shown this once; only its hash is kept.")


def _tell(line: str) -> None:
    # Not on standard output, which has the key and nothing else.
    print(line, file=sys.stderr)  # noqa: T201
