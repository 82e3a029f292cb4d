"""The lease board: shared words with one writer each, and a file that no crash leaves behind."""

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.board import SEGMENT_SUFFIX, Board, Counter, Outcome, Word, new_nonce, remove_stale
from slipstream.errors import StartupError, TransferError

OWNER = """
import sys, time
from pathlib import Path
from kv_transfer.board import Board
board = Board.create(Path(sys.argv[1]), slots=4)
board.path.with_name(f"{board.stem}-landing.kv").write_bytes(b"landed")
print(board.path.name, flush=True)
time.sleep(600)
"""


def test_what_one_side_writes_the_other_side_reads(tmp_path: Path) -> None:
    ours = Board.create(tmp_path, slots=8)
    theirs = Board.open(ours.path)
    nonce = new_nonce()
    theirs.put(7, Word.HELD, nonce)
    ours.add(Counter.BYTES_RECEIVED, 5)
    ours.publish_endpoint(b"endpoint")
    assert ours.get(7, Word.HELD) == nonce
    assert ours.get(6, Word.HELD) == 0
    assert theirs.counter(Counter.BYTES_RECEIVED) == 5
    assert theirs.endpoint() == b"endpoint"
    assert (theirs.epoch, theirs.slots) == (ours.epoch, 8)


def test_there_is_no_endpoint_before_the_engine_has_loaded(tmp_path: Path) -> None:
    assert Board.create(tmp_path, slots=2).endpoint() == b""


def test_an_outcome_belongs_to_one_lease_only(tmp_path: Path) -> None:
    board = Board.create(tmp_path, slots=2)
    mine, other = new_nonce(), new_nonce()
    board.put(0, Word.OUTCOME, mine | Outcome.EXPIRED)
    assert board.outcome(0, mine) is Outcome.EXPIRED
    assert board.outcome(0, other) is None
    assert board.outcome(1, mine) is None


def test_nonces_leave_room_for_the_outcome_and_are_never_zero() -> None:
    nonces = {new_nonce() for _ in range(1000)}
    assert len(nonces) == 1000
    assert all(nonce and nonce & 7 == 0 and nonce < 2**64 for nonce in nonces)


def test_a_board_that_is_gone_or_is_something_else_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(TransferError) as gone:
        Board.open(tmp_path / "slipstream-0.board")
    assert gone.value.code == "worker_gone"
    strange = tmp_path / "slipstream-1.board"
    strange.write_bytes(b"\1" * 4096)
    with pytest.raises(TransferError) as bad:
        Board.open(strange)
    assert bad.value.code == "bad_handoff"
    short = tmp_path / "slipstream-2.board"
    short.write_bytes(b"")
    with pytest.raises(TransferError):
        Board.open(short)


def test_a_truncated_board_is_refused_instead_of_crashing_its_reader(tmp_path: Path) -> None:
    board = Board.create(tmp_path, slots=8)
    cut = tmp_path / "slipstream-cut.board"
    cut.write_bytes(board.path.read_bytes()[:1024])
    with pytest.raises(TransferError):
        Board.open(cut)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="nowhere"):
        Board.create(tmp_path / "nowhere", slots=8)


def test_an_endpoint_larger_than_its_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="room"):
        Board.create(tmp_path, slots=2).publish_endpoint(bytes(1 << 20))


def test_boards_of_killed_workers_are_swept_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    mine = Board.create(tmp_path, slots=2)
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert remove_stale(tmp_path) == []
        owner.send_signal(signal.SIGKILL)
        owner.wait(timeout=10)
    assert remove_stale(tmp_path) == [name]
    assert [path.name for path in tmp_path.iterdir()] == [mine.path.name]  # the landing area went with its board


def test_unlink_removes_the_board_and_its_landing_area(tmp_path: Path) -> None:
    board = Board.create(tmp_path, slots=2)
    board.path.with_name(f"{board.stem}-landing.kv").write_bytes(b"x")
    board.unlink()
    assert list(tmp_path.iterdir()) == []
    board.put(0, Word.HELD, 8)  # mapped views stay valid until they are closed
    board.close()


def test_a_board_that_is_just_being_made_is_not_taken_for_a_dead_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that start together: one sweeps while the other has its file, but not yet the lock on it."""
    lock = fcntl.flock

    def sweep_and_lock(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        assert remove_stale(tmp_path) == []
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_and_lock)
    board = Board.create(tmp_path, slots=2)
    assert Board.open(board.path).epoch == board.epoch


def test_nodes_of_one_worker_have_its_epoch_and_seed_on_boards_of_their_own(tmp_path: Path) -> None:
    first = Board.create(tmp_path, slots=4)
    second = Board.create(tmp_path, slots=1, epoch=first.epoch, seed=first.seed, node=1)
    third = Board.create(tmp_path, slots=1, epoch=first.epoch, seed=first.seed, node=11)
    assert {board.epoch for board in (first, second, third)} == {first.epoch}
    assert {board.seed for board in (first, second, third)} == {first.seed}
    boards = (first, second, third)
    areas = [tmp_path / f"{board.stem}-1{SEGMENT_SUFFIX}" for board in boards]
    for area in areas:
        area.touch()
    for number, board in enumerate(boards):
        board.unlink()
        assert [area.exists() for area in areas] == [False] * (number + 1) + [True] * (2 - number)
        assert [other.path.exists() for other in boards] == [False] * (number + 1) + [True] * (2 - number)
