"""One question, its answer as it streams, and the account of what it took: on which workers, moved how, how fast."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slipstream.client import Account, AsyncClient, Completion, Piece, Tls
from slipstream.client.results import completion_from_pieces

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Timing:
    """What the client saw.

    Attributes:
        ttft_s: from sending the request to the first token.
        itl_s: for each further token, the time since the one before; tokens that came together share theirs.
    """

    ttft_s: float
    itl_s: tuple[float, ...]


def timing(sent_s: float, arrivals: Sequence[tuple[float, int]]) -> Timing:
    """From (time, tokens) of every arrival that had tokens, in order."""
    if not arrivals:
        return Timing(0.0, ())
    gaps: list[float] = [0.0] * (arrivals[0][1] - 1)
    for (before_s, _), (now_s, tokens) in itertools.pairwise(arrivals):
        gaps += [(now_s - before_s) / tokens] * tokens
    return Timing(arrivals[0][0] - sent_s, tuple(gaps))


async def ask_and_account(
    target: str,
    prompt: str,
    max_tokens: int,
    console: Console,
    tls: Tls | None = None,
    key: str | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Ask, print the answer as it comes, then the account. Raises the client's errors."""
    console.print(Text.assemble(("\n> ", "bold cyan"), prompt), soft_wrap=True)
    pieces: list[Piece] = []
    arrivals: list[tuple[float, int]] = []
    async with AsyncClient(target, timeout_s=_TIMEOUT_S, tls=tls, api_key=key) as client:
        messages = [{"role": "user", "content": prompt}]
        sent_s = clock()
        async for piece in client.chat(messages, max_tokens=max_tokens, temperature=0.0):  # type: ignore[arg-type]
            if piece.token_ids:
                arrivals.append((clock(), len(piece.token_ids)))
            pieces.append(piece)
            console.out(piece.text, end="", highlight=False)
            console.file.flush()
    console.print("\n")
    console.print(account_table(completion_from_pieces(pieces), timing(sent_s, arrivals)))


def account_table(answer: Completion, measured: Timing) -> Table:
    """One screen of figures."""
    table = Table(title="What happened", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in [*_account_rows(answer.account), *_answer_rows(answer, measured)]:
        table.add_row(name, value)
    return table


def _account_rows(account: Account | None) -> list[tuple[str, str]]:
    if account is None:
        return [("account", "none was sent")]
    prefill = f"{account.prefill_computed_tokens} computed, {account.prefill_cached_tokens} cached"
    decode = f"{account.decode_computed_tokens} computed, {account.decode_cached_tokens} cached"
    moved = f"{account.kv_blocks_moved} blocks, {account.kv_bytes_moved:,} bytes"
    transfer = f"{account.transfer_s * 1e3:.2f} ms of work, {account.transfer_exposed_s * 1e3:.2f} ms after prefill, "
    transfer += account.transport or "nothing moved"
    if account.partial:
        decode = moved = transfer = "not told: a stop string ended the answer"
    return [
        ("prompt", f"{account.prompt_tokens} tokens"),
        ("prefill", f"{prefill} on {account.prefill_worker} in {account.prefill_s * 1e3:.1f} ms")
        if account.prefill_worker
        else ("prefill", "none: the decode worker computed the prompt"),
        ("KV moved", moved),
        ("transfer", transfer),
        ("decode", f"prompt tokens {decode} on {account.decode_worker}"),
        ("fallback", account.fallback or "none"),
        ("attempts", str(account.attempts)),
    ]


def _answer_rows(answer: Completion, measured: Timing) -> list[tuple[str, str]]:
    rows = [
        ("answer", f"{answer.usage.completion_tokens} tokens, ended by {answer.finish_reason}"),
        ("TTFT", f"{measured.ttft_s * 1e3:.1f} ms"),
    ]
    if measured.itl_s:
        mean, median, longest = statistics.mean(measured.itl_s), statistics.median(measured.itl_s), max(measured.itl_s)
        itl = f"mean {mean * 1e3:.2f} ms, p50 {median * 1e3:.2f} ms, max {longest * 1e3:.2f} ms"
        rows += [("ITL", itl), ("speed", f"{1 / mean:.1f} tokens/s" if mean > 0 else "-")]
    return rows
