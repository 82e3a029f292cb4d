"""What the ranks of an engine say of a transfer, put together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.accounts import TransferReport
from kv_transfer.rank_reports import RankReports

DONE = TransferReport(blocks=3, bytes_moved=300, wire_bytes=300, seconds=0.5, exposed_s=0.1, path="shm/direct")


def test_a_transfer_is_done_when_the_last_rank_has_its_part() -> None:
    reports = RankReports(2)
    assert reports.take("r", {1: DONE}) is None
    slower = TransferReport(
        blocks=3, bytes_moved=300, wire_bytes=310, seconds=0.25, exposed_s=0.2, resent=1, path="ucx"
    )
    whole = reports.take("r", {0: slower})
    assert whole == TransferReport(3, 600, 610, 0.75, 0.2, 1, "ucx")
    assert not reports.outstanding("r")


def test_a_failure_of_one_rank_is_told_at_once_and_once() -> None:
    reports = RankReports(3)
    assert reports.take("r", {2: DONE}) is None
    failed = reports.take("r", {1: TransferReport(failure="digest")})
    assert failed is not None
    assert failed.failure == "digest"
    assert reports.outstanding("r")  # rank 0 is to be told to stop
    assert reports.take("r", {0: TransferReport(failure="cancelled")}) is None
    assert not reports.outstanding("r")


@given(
    ranks=st.integers(1, 6),
    failing=st.sets(st.integers(0, 5)),
    order=st.permutations(range(6)),
    together=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_in_whatever_order_ranks_report_a_transfer_is_told_once_and_forgotten(
    ranks: int, failing: set[int], order: list[int], together: list[bool]
) -> None:
    reports = RankReports(ranks)
    told: list[TransferReport] = []
    step: dict[int, TransferReport] = {}
    for rank in (rank for rank in order if rank < ranks):
        step[rank] = TransferReport(failure="timeout") if rank in failing else DONE
        if together[rank]:
            continue
        told += [report for report in [reports.take("r", step)] if report is not None]
        step = {}
    if step:
        told += [report for report in [reports.take("r", step)] if report is not None]
    assert [bool(report.failure) for report in told] == [bool(failing & set(range(ranks)))]
    assert not reports.outstanding("r")
