"""The ways of KV blocks between workers, as commands show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from slipstream.v1.registry_pb2 import TransferPath, WorkerRecord, WorkerSet

MAX_SHOWN = 40


@dataclass(frozen=True, slots=True)
class PathRow:
    """The way from one worker to another. Names and units are those of `slipstream.v1.TransferPath`.

    Attributes:
        measured_unix_s: 0 when it has not been measured yet; the fields before it are then empty.
    """

    sender: str
    receiver: str
    transport: str = ""
    detail: str = ""
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    warning: str = ""
    error: str = ""
    measured_unix_s: int = 0

    @property
    def works(self) -> bool:
        return self.measured_unix_s > 0 and not self.error


def from_wire(path: TransferPath, receiver: str) -> PathRow:
    return PathRow(
        sender=path.peer_worker_id,
        receiver=receiver,
        transport=path.transport,
        detail=path.detail,
        bytes_per_s=path.bytes_per_s,
        latency_s=path.latency_s,
        warning=path.warning,
        error=path.error,
        measured_unix_s=path.measured_unix_s,
    )


def path_rows(worker_set: WorkerSet) -> list[PathRow]:
    """Every pair of a set, prefill to decode first, then the ways back; by name.

    A worker that has no transfer agent yet is in no pair, and what was measured with an agent that is gone is not told.
    """
    from slipstream.v1.registry_pb2 import Role

    with_agent = sorted((each for each in worker_set.workers if each.transfer.address), key=lambda each: each.worker_id)
    there, back = [], []
    for prefill in (each for each in with_agent if each.role == Role.ROLE_PREFILL):
        for decode in (each for each in with_agent if each.role == Role.ROLE_DECODE and each.model == prefill.model):
            there.append(_row(prefill, decode))
            back.append(_row(decode, prefill))
    return there + back


def worth_showing(rows: Sequence[PathRow], prefill_ids: set[str]) -> tuple[list[PathRow], int]:
    """What fits on a screen: each pair's way from prefill to decode; of the ways back those with something to tell.

    Returns:
        Rows, the worst first when not all fit, and how many pairs were left out.
    """
    shown = [row for row in rows if row.sender in prefill_ids or row.warning or row.error]
    if len(shown) <= MAX_SHOWN:
        return shown, 0
    worst_first = sorted(shown, key=lambda row: (not row.error, not row.warning, row.works, row.bytes_per_s))
    return worst_first[:MAX_SHOWN], len(shown) - MAX_SHOWN


def paths_table(rows: Sequence[PathRow], *, left_out: int = 0) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for name in ("KV blocks from", "to", "way"):
        table.add_column(name)
    for name in ("bandwidth", "latency"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for row in rows:
        measured = (bandwidth(row.bytes_per_s), latency(row.latency_s)) if row.works else ("-", "-")
        table.add_row(row.sender, row.receiver, _way(row), *measured, _note(row))
    if left_out:
        table.caption = f"{left_out} more, none worse than these; --json has all of them."
    return table


def bandwidth(bytes_per_s: float) -> str:
    """`4.21 GB/s`, `118 MB/s`, `0.9 MB/s`."""
    if bytes_per_s >= 1e9:
        return f"{bytes_per_s / 1e9:.2f} GB/s"
    return f"{bytes_per_s / 1e6:.0f} MB/s" if bytes_per_s >= 1e7 else f"{bytes_per_s / 1e6:.1f} MB/s"


def latency(seconds: float) -> str:
    """`85 µs`, `1.42 ms`, `1.20 s`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _row(sender: WorkerRecord, receiver: WorkerRecord) -> PathRow:
    peer = (sender.worker_id, sender.transfer.epoch)
    for path in receiver.paths:
        if (path.peer_worker_id, path.peer_epoch) == peer:
            return from_wire(path, receiver.worker_id)
    return PathRow(sender.worker_id, receiver.worker_id)


def _way(row: PathRow) -> Text:
    from rich.text import Text

    if row.error:
        return Text(f"{row.transport}: none" if row.transport else "none", style="bold red")
    if not row.measured_unix_s:
        return Text("not measured", style="dim")
    return Text(f"{row.transport}/{row.detail}", style="yellow" if row.warning else "green")


def _note(row: PathRow) -> Text:
    from rich.text import Text

    if row.error:
        return Text(f"error: {row.error}", style="red")
    return Text(f"warning: {row.warning}" if row.warning else "", style="yellow")
