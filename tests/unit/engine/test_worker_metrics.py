"""What a worker's /metrics say, read over HTTP: the counters of its board, and the ways that it has measured."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.admission import Admission
from engine.worker_metrics import MetricsServer
from kv_transfer.accounts import BYTES_BY_WAY, FAILURES, Accounts, TransferReport
from kv_transfer.board import Board, Counter
from slipstream.v1.registry_pb2 import Capacity, Load, Role, TransferPath
from tests.support.cluster import scrape


class IdleEngine:
    """Has nothing to do: all that is counted here is on the board."""

    def load(self) -> Load:
        return Load(handoffs_held=3)

    def capacity(self) -> Capacity:
        return Capacity(blocks=100, block_bytes=4096)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board.create(tmp_path, slots=16)
    yield board
    board.unlink()
    board.close()


@pytest.fixture
def paths() -> list[TransferPath]:
    return []


@pytest.fixture
def url(board: Board, paths: list[TransferPath]) -> Iterator[str]:
    with MetricsServer("127.0.0.1", 0, Role.ROLE_DECODE, "decode-0", model="tiny") as server:
        server.watch(IdleEngine(), board, Admission(limit=4), lambda: paths)  # type: ignore[arg-type]
        yield server.url


def report(path: str, *, seconds: float, exposed_s: float, failure: str = "") -> TransferReport:
    return TransferReport(
        blocks=2,
        bytes_moved=8192,
        wire_bytes=9000,
        seconds=seconds,
        exposed_s=exposed_s,
        resent=1,
        path=path,
        failure=failure,
    )


def test_a_transfer_is_counted_by_the_way_it_took(url: str, board: Board) -> None:
    accounts = Accounts(board)
    for way in ("shm/direct", "shm/staged", "ucx/tcp/eth0", "nixl/LIBFABRIC/efa", "shm/direct"):
        accounts.book("r", report(way, seconds=0.1, exposed_s=0.0))
    seen = scrape(url)
    assert (seen["slipstream_kv_transfer_blocks_total"], seen["slipstream_kv_transfer_bytes_total"]) == (10, 5 * 8192)
    assert seen["slipstream_kv_transfer_wire_bytes_total"] == 45000
    by_path = {path: seen[f"slipstream_kv_transfer_bytes_by_path_total:{path}"] for path in BYTES_BY_WAY}
    assert by_path == {"shm/direct": 16384, "shm/staged": 8192, "ucx": 8192, "nixl": 8192}
    assert seen["slipstream_kv_transfers_total:done"] == 5
    assert seen["slipstream_kv_transfer_spans_resent_total"] == 5


def test_the_wait_of_one_transfer_hides_nothing_of_another(url: str, board: Board) -> None:
    accounts = Accounts(board)
    accounts.book("a", report("shm/direct", seconds=0.5, exposed_s=0.1))
    before = scrape(url)["slipstream_kv_transfer_hidden_seconds_total"]
    accounts.book("b", report("shm/direct", seconds=0.1, exposed_s=0.75))
    seen = scrape(url)
    assert seen["slipstream_kv_transfer_seconds_total"] == pytest.approx(0.6)
    assert seen["slipstream_kv_transfer_exposed_seconds_total"] == pytest.approx(0.85)
    assert seen["slipstream_kv_transfer_hidden_seconds_total"] == before == pytest.approx(0.4)


def test_failures_are_told_by_cause_and_a_client_that_left_is_none(url: str, board: Board) -> None:
    accounts = Accounts(board)
    for number, cause in enumerate((*FAILURES, "worker_gone", "something_new")):
        accounts.open(f"r{number}", prompt_tokens=10)
        accounts.book(f"r{number}", report("", seconds=0, exposed_s=0, failure=cause))
        accounts.first_step(f"r{number}", 10, computed=0, scheduled=10)
    accounts.open("left", prompt_tokens=10)
    accounts.book("left", report("", seconds=0, exposed_s=0, failure="lease_ended"))
    accounts.close("left")
    seen = scrape(url)
    causes = {
        name.partition(":")[2]: value
        for name, value in seen.items()
        if name.startswith("slipstream_kv_transfer_failures_total")
    }
    assert causes == {
        "worker_gone": 2,
        "timeout": 1,
        "lease_ended": 1,
        "digest": 1,
        "no_path": 1,
        "not_registered": 1,
        "bad_identity": 1,
        "bad_token": 1,
        "other": 1,
    }
    assert seen["slipstream_kv_transfers_total:failed"] == sum(causes.values())
    assert seen["slipstream_kv_transfers_total:cancelled"] == 2
    assert seen["slipstream_kv_transfer_bytes_total"] == 0


def test_leases_are_told_by_their_end_and_those_that_are_open(url: str, board: Board) -> None:
    ends = ("TAKEN", "RELEASED", "EXPIRED", "NOT_CACHED")
    for times, end in enumerate(ends, start=1):
        board.add(Counter[f"HANDOFFS_{end}"], times)
    board.add(Counter.HANDOFFS_OPENED, 13)
    board.add(Counter.HANDOFFS_RESET, 5)
    seen = scrape(url)
    assert [seen[f"slipstream_kv_handoffs_total:{end.lower()}"] for end in ends] == [1, 2, 3, 4]
    assert seen["slipstream_kv_handoffs_opened_total"] == 13
    assert seen["slipstream_kv_handoffs_reset_total"] == 5
    assert seen["slipstream_kv_handoffs_held"] == 3


def test_a_measured_way_is_shown_until_its_peer_has_gone(url: str, paths: list[TransferPath]) -> None:
    assert not any(name.startswith("slipstream_kv_path_") for name in scrape(url))
    paths.append(TransferPath(peer_worker_id="p0", transport="shm", detail="direct", bytes_per_s=4e9, latency_s=2e-5))
    paths.append(TransferPath(peer_worker_id="p1", error="refused"))
    seen = {name: value for name, value in scrape(url).items() if name.startswith("slipstream_kv_path_")}
    assert seen == {
        "slipstream_kv_path_bandwidth_bytes_per_second:direct:p0:shm": 4e9,
        "slipstream_kv_path_latency_seconds:direct:p0:shm": 2e-5,
        "slipstream_kv_path_broken:p1": 1,
    }
    paths.clear()
    assert not any(name.startswith("slipstream_kv_path_") for name in scrape(url))


def test_all_figures_carry_the_role_that_the_worker_has_now(board: Board) -> None:
    with MetricsServer("127.0.0.1", 0, Role.ROLE_DECODE, "w0", model="tiny") as server:
        server.watch(IdleEngine(), board, Admission(limit=4), lambda: ())  # type: ignore[arg-type]
        for role, name in ((Role.ROLE_DECODE, "decode"), (Role.ROLE_PREFILL, "prefill")):
            server.role = role
            with urllib.request.urlopen(server.url, timeout=10) as page:
                text = page.read().decode()
            assert set(re.findall(r'role="(\w+)"', text)) == {name}
