"""What a key costs a frontend: `python -m benchmarks.api_keys [--json]`.

CPU time of all that is done for a request because there are keys (find it, look at its scopes, take a place, charge,
settle, tell what is left), without the request around it. In one process, and with the accounts in memory that a pool's
processes share. CPU seconds and not time, so that what else the machine does matters little.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from frontend.admission.claim import Priority
from frontend.keys.entries import KeyFile, parsed
from frontend.keys.guard import Guard
from frontend.keys.keyring import Keyring
from frontend.keys.ledger import Ledger
from frontend.keys.secret import NewKey, new_key
from frontend.keys.table import SharedTable, Table

_REQUESTS = 20_000
_KEYS = 1000
_LIMITS = {
    "requests_per_minute": 10**9,
    "input_tokens_per_minute": 10**11,
    "output_tokens_per_minute": 10**11,
    "streams": 1000,
}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU microseconds a request.

    Attributes:
        let_in: to find the key and look at its scopes.
        whole: that, and its rates and the headers that tell of them.
    """

    accounts: str
    let_in_us: float
    whole_us: float


@app.command()
def api_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a key costs a request."""
    key, content = _content()
    with tempfile.TemporaryDirectory() as folder:
        shared = SharedTable(Path(folder) / "keys", 0, 4)
        costs = [_measured("own", None, key, content), _measured("shared", shared, key, content)]
        shared.close()
    if as_json:
        print(json.dumps([asdict(one) for one in costs], indent=2))  # noqa: T201
        return
    for one in costs:
        print(f"{one.accounts:8} let in {one.let_in_us:5.1f} us, with rates {one.whole_us:5.1f} us a request")  # noqa: T201


def _content() -> tuple[NewKey, KeyFile]:
    made = [new_key() for _ in range(_KEYS)]
    entries = [{"id": one.key_id, "sha256": one.sha256, "tenant": "acme", "limits": _LIMITS} for one in made]
    return made[_KEYS // 2], parsed({"keys": entries}, "keys")


def _measured(name: str, table: Table | None, key: NewKey, content: KeyFile) -> Cost:
    guard = Guard(Keyring(content), Ledger(table))
    headers = [(b"host", b"x"), (b"content-type", b"x"), (b"authorization", f"Bearer {key.plain}".encode())]
    began_s = time.process_time()
    for _ in range(_REQUESTS):
        guard.http_caller(headers, "chat")
    let_in_s = time.process_time() - began_s
    began_s = time.process_time()
    for _ in range(_REQUESTS):
        caller = guard.http_caller(headers, "chat")
        assert caller is not None, "there are keys"
        caller.allowed_class(None, Priority.REALTIME)
        caller.check_model("model")
        with caller.enter() as spending:
            caller.charge(spending, 100, 100)
            caller.limit_headers()
            caller.settle(spending, 50, void=False)
    whole_s = time.process_time() - began_s
    return Cost(name, let_in_s / _REQUESTS * 1e6, whole_s / _REQUESTS * 1e6)


if __name__ == "__main__":
    app()
