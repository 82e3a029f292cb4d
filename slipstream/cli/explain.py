"""`slipstream explain`: how a request came to its workers, why to those, what was expected of that, what came of it."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote, urlsplit

import msgspec
import typer

from slipstream.cli.face_tls import api_key, http_address
from slipstream.cli.flags import select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError, InvalidRequestError, UnavailableError
from slipstream.security.http_ends import opened

if TYPE_CHECKING:
    from rich.table import Table

    from frontend.admission.accounts import AdmissionAccount
    from frontend.decisions import Decision

PANEL = "Use a cluster"
TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 16 << 20


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream explain my-request-1", "by the X-Request-Id of a request or of its answer"),
            ("slipstream explain my-request-1 --json | jq '.dispatches[0].considered'", "for programs"),
        ),
    )(explain)


@with_settings(*select("api_key", "frontend.host", "frontend.http_port", "security.tls_folder"))
def explain(
    loaded: LoadedConfig,
    request_id: Annotated[str, typer.Argument(help="As in the answer's X-Request-Id header.")],
    frontend: Annotated[
        str | None, typer.Option("--frontend", metavar="URL", help="The HTTP address of the frontend that was asked.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how long a request waited, why it went to its workers, what was predicted, and what came of it."""
    content = fetch(frontend or http_address(loaded.settings), request_id, api_key(loaded.settings))
    if as_json:
        print(content.decode())  # noqa: T201
        return
    from frontend.explanation import Explanation
    from slipstream.cli.terminal import output

    console = output()
    explanation = msgspec.json.decode(content, type=Explanation)
    for account in explanation.admissions:
        console.print(admission_line(account, explanation.unix_s), highlight=False)
    for decision in explanation.dispatches:
        for line in lines(decision):
            console.print(line, highlight=False)
        if decision.considered:
            console.print(table(decision))


def fetch(address: str, request_id: str, key: str | None = None) -> bytes:
    """What a frontend says of a request, as JSON.

    Raises:
        ConfigError: the address is none.
        InvalidRequestError: the frontend does not know the request.
        UnavailableError: the frontend does not answer.
    """
    base = address if "//" in address else f"http://{address}"
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).netloc:
        raise ConfigError(f"--frontend = {address} is not an HTTP address, such as http://127.0.0.1:8000")
    url = f"{base.rstrip('/')}/slipstream/v1/requests/{quote(request_id, safe='')}"
    try:
        with opened(url, TIMEOUT_S, key) as answer:
            content: bytes = answer.read(_MAX_ANSWER_BYTES)
            return content
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                raise InvalidRequestError(
                    f"the frontend at {base} does not know request {request_id}: it remembers the last ones that "
                    "came to it itself, until it is restarted"
                ) from None
            raise UnavailableError(f"the frontend at {base} answers {error.code} {error.reason}") from None
    except OSError as error:
        raise UnavailableError(f"the frontend at {base} does not answer: {error}") from None


def admission_line(account: AdmissionAccount, now_unix_s: float) -> str:
    """How it came to the workers, or did not."""
    said = f"[bold]{account.request_id}[/bold] admission: {account.service_class}, tenant {account.tenant}; "
    waited = f"after {_ms(account.waited_s)} in the queue" if account.waited_s else "without a wait"
    match account.state:
        case "admitted":
            said += f"sent {waited}"
        case "waiting":
            said += f"waiting for {_ms(now_unix_s - account.since_unix_s)} now"
        case "left":
            said += f"its client left, or its time was over, {waited}"
        case refusal:
            said += f"refused ({refusal}) {waited}"
    if account.preemptions:
        times = "once" if account.preemptions == 1 else f"{account.preemptions} times"
        said += f", taken from the workers again {times}"
    if account.retry_after_s is not None:
        said += f", to come again after {math.ceil(account.retry_after_s)} s"
    return said


def lines(decision: Decision) -> list[str]:
    """What was decided, and what came of it, in words."""
    where = f"prefill [bold]{decision.prefill_worker}[/bold], " if decision.prefill_worker else ""
    said = [
        f"[bold]{decision.request_id}[/bold] dispatch {decision.attempt}: {decision.prompt_tokens} prompt tokens, "
        f"policy {decision.policy}",
        f"  {where}decode [bold]{decision.decode_worker}[/bold], because: {decision.reason}"
        + (f" ({decision.fallback})" if decision.fallback else ""),
    ]
    if decision.after:
        had = f", its client had {decision.resumes} tokens" if decision.resumes else ""
        said.append(f"  sent again after: {decision.after}{had}")
    for what, workers in (("failed it before", decision.excluded), ("not answering", decision.suspects)):
        if workers:
            said.append(f"  left out, {what}: {', '.join(workers)}")
    seen = decision.actual
    if seen is None:
        return [*said, "  not ended yet"]
    expected = decision.considered[0] if decision.considered else None
    for name, actual_s, predicted_s in (
        ("prompt computed", seen.prefill_s, expected.queue_s + expected.prefill_s if expected else None),
        ("first token", seen.ttft_s, expected.ttft_s if expected else None),
        ("between tokens", seen.itl_s, expected.itl_s if expected else None),
    ):
        if actual_s is not None:
            predicted = "" if predicted_s is None else f", predicted {_ms(predicted_s)}"
            said.append(f"  {name}: {_ms(actual_s)}{predicted}")
    computed = "" if seen.computed_tokens is None else f"{seen.computed_tokens} prompt tokens computed, "
    return [*said, f"  {computed}{seen.tokens} tokens generated"]


def table(decision: Decision) -> Table:
    """The choices that were weighed, the best first."""
    from rich.table import Table

    columns = ("prefill", "decode", "new tokens", "queue", "prefill", "transfer", "slot", "step", "others", "cost")
    shown = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for one in decision.considered:
        times = (one.queue_s, one.prefill_s, one.transfer_s, one.slot_s, one.itl_s, one.others_s, one.cost_s)
        prefill = one.prefill_worker or "-"
        shown.add_row(prefill, one.decode_worker, str(one.new_tokens), *map(_ms, times))
    return shown


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
