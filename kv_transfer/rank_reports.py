"""What the tensor-parallel ranks of an engine say of one transfer, put together.

Each rank receives its own part of the blocks. The transfer is done when all of them have theirs, and has failed when
one has failed: nobody waits for the others to find that out, they are told to stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kv_transfer.accounts import TransferReport


@dataclass(slots=True)
class _Open:
    reports: dict[int, TransferReport] = field(default_factory=dict)
    told: bool = False


class RankReports:
    """Every rank reports every transfer that it was told to open once; then this forgets it.

    Args:
        ranks: of the engine.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._open: dict[str, _Open] = {}

    def take(self, request_id: str, reports: Mapping[int, TransferReport]) -> TransferReport | None:
        """The report of the whole transfer: once, when the last rank is done or the first one has failed."""
        transfer = self._open.setdefault(request_id, _Open())
        transfer.reports.update(reports)
        failed = any(report.failure for report in transfer.reports.values())
        complete = len(transfer.reports) == self._ranks
        if complete:
            del self._open[request_id]
        if transfer.told or not (failed or complete):
            return None
        transfer.told = True
        return together(transfer.reports)

    def outstanding(self, request_id: str) -> bool:
        """Whether some ranks have reported this transfer, and others have not."""
        return request_id in self._open


def together(reports: Mapping[int, TransferReport]) -> TransferReport:
    """One report: what was moved by all ranks, and the longest wait; the failure of the lowest rank that has one."""
    inside = [reports[rank] for rank in sorted(reports)]
    first = inside[0]
    return TransferReport(
        blocks=max(report.blocks for report in inside),
        bytes_moved=sum(report.bytes_moved for report in inside),
        wire_bytes=sum(report.wire_bytes for report in inside),
        seconds=sum(report.seconds for report in inside),
        exposed_s=max(report.exposed_s for report in inside),
        resent=sum(report.resent for report in inside),
        path=first.path,
        failure=next((report.failure for report in inside if report.failure), ""),
    )
